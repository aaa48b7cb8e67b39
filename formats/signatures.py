"""First bytes by which files are known, whatever their names."""
COMPRESSIONS = {"gzip": b"\x1f\x8b", "xz": b"\xfd7zXZ\x00", "zstd": b"\x28\xb5\x2f\xfd"}
PARQUET = b"PAR1"
ARROW = b"ARROW1"             # a file with an index: Feather is one
STREAM = b"\xff\xff\xff\xff"  # a stream: datasets.save_to_disk writes it
