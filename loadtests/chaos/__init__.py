"""What clients see of a server whose processes are killed, stopped and broken. HTTP, /proc and signals only."""
