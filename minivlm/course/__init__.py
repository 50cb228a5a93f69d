"""All that teaches: the chapters, their exercises, grading, and figures."""
