"""From labelled texts to tokenised documents with a class."""
