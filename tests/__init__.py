"""The proofs of what isotune promises."""
