"""What makes a step on CPU fast. Readers who train on GPUs can skip this folder."""
