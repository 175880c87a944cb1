"""A smaller model that drafts."""
