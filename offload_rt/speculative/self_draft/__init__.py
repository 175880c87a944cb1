"""The target drafts for itself, with rounded copies in place of its streamed layers."""
