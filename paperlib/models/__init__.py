"""The networks that are measured; nothing here knows about measuring them."""

from paperlib.models.cct import cct as cct
