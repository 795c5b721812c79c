"""The policy, the codec and the recogniser."""
