"""From pixels to an encoded set: the toy world, pictures and videos, manifests, curation, encoding.
May import rope, networks and support."""
