"""Everything that has a device or a file: recordings, subtitles, the command line and the live client."""
