"""What every layer needs: errors in one sentence, atomic files, one argument parser, nearest names."""
