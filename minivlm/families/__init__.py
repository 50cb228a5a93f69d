"""Seven other ways to put an image into a language model, on this package's own parts, one file each.

============== ============================================================ =====================================
file           how the image gets in                                        what is trained
============== ============================================================ =====================================
``visualbert`` regions beside the words of a bidirectional transformer      the transformer
``simvlm``     patches of a convolution stem, in the prefix                 everything, from nothing
``cm3``        as codes, tokens like any other                              everything, from nothing
``clipcap``    one vector, mapped to a prefix                               the mapping; with the MLP, the LM too
``visualgpt``  cross-attention in every layer, gated by what the layer says all but the tower
``flamingo``   cross-attention before every layer; its gates start closed   resampler and gated blocks
``magic``      as a score for the next word                                 nothing
============== ============================================================ =====================================
"""
