"""Heads that were pretrained with the trunk against heads added afterwards."""
