"""The policy, the codec, Whisper, and measures of speech."""
