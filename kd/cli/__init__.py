"""What the commands share: errors of one line, help and the terminal."""
