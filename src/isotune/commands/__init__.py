"""What the `isotune` command and the scripts of train/ and eval/ do: each body stands once, here."""
