"""What is said on the wire: how clients and the service speak with each other. No socket, no clock, no weights."""
