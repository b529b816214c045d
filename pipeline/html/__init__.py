"""Render HTML pages and SVG charts."""
