"""From a description of work and a profile to seconds. No torch here."""
