"""What the commands share: errors of one line, help, the terminal and the environment."""
