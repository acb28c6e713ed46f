"""The recipe of the embedded speech recogniser."""
