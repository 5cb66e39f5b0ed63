"""A small server that speaks the Hugging Face Hub's HTTP interface, and repositories in the layout of the real ones."""
