"""Model definitions: single-device code that never names a mesh."""
