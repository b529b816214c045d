"""Decoders of videos by choice: PyAV, decord, and the ffmpeg command."""
