"""How anything here is trained."""
