"""Manifests: typed settings of a stage, read from YAML."""
