"""From conversations to tokenised documents with a supervised mask."""
