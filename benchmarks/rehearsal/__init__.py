"""A dress rehearsal of the published recipe: its manifests, names, formats and commands on small media and weights."""
