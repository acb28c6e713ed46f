"""Everything that has a past: one file per arrow from audio bytes to events.

``audio`` → ``features`` → ``encoder`` → ``transducer`` → ``text`` → ``session`` (→ ``events``)
"""
