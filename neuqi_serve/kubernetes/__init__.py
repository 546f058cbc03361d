"""Manifests for one model: the tested base (``deploy/kubernetes/base``) and an overlay with the sizes of a plan."""
