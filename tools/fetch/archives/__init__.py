"""Readers for single members of zip, tar, tar.gz and parquet files, without unpacking them."""
