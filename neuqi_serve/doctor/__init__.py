"""What of this machine and installation keeps the server from running well, each finding with its remedy."""
