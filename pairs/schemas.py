"""The Arrow schema of every table on disk. Row i of every table of a shard is the same pair.

Names that img2dataset and DataComp already use are kept (`uid, url, text, key, width, height,
original_width, original_height, sha256, exif`). Pixels are never in a table, only offsets into the tar.
"""

import pyarrow as pa

TEXT = pa.struct([("text", pa.string()), ("kind", pa.string()), ("language", pa.string())])
TEXTS = pa.list_(TEXT)
KEPT_TEXT = pa.struct(
    [("text", pa.string()), ("kind", pa.string()), ("language", pa.string()), ("probability", pa.float32())]
)

CANDIDATES = pa.schema(
    [
        ("url_key", pa.string()),
        ("url", pa.string()),  # as first found, without fragment; for local sources "<source>:<relative path>"
        ("texts", TEXTS),
        ("page", pa.string()),  # the first page, in order of its URL, that shows the image
        ("found", pa.string()),  # img, figure, og, row, file, tar
        ("license", pa.string()),
        ("opt_out", pa.string()),  # why it must not be fetched; null where it may
        ("source_uid", pa.string()),
    ]
)

LEDGER = pa.schema(
    [
        ("url_key", pa.string()),
        ("url", pa.string()),
        ("status", pa.string()),  # ok, transient, permanent, refused
        ("reason", pa.string()),  # error class; null for ok
        ("http_status", pa.int32()),
        ("attempts", pa.int32()),
        ("started_at", pa.timestamp("ms", tz="UTC")),
        ("elapsed_s", pa.float32()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("uid", pa.string()),
        ("retry_at", pa.timestamp("ms", tz="UTC")),  # not before: the site's Retry-After; null without, or where older
    ]
)

TRIES = LEDGER.append(pa.field("increment", pa.string()))  # of keys that several merged increments tried: all rows

PAIRS = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("url_key", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("texts", TEXTS),
        ("page", pa.string()),
        ("license", pa.string()),
        ("source_uid", pa.string()),
        ("status", pa.string()),  # ok, forgotten
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("original_format", pa.string()),
        ("original_bytes", pa.int64()),
        ("sha256", pa.string()),  # of the original bytes
        ("exif", pa.string()),
        ("image_ext", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        # sorted words for what the original was but RGB: alpha, animated, cmyk, deep (16 bits), grey, palette; or null
        ("colour", pa.string()),
    ]
)

SELECTION = pa.schema(
    [
        ("uid", pa.string()),
        ("kept", pa.bool_()),
        ("dropped_by", pa.string()),  # the first rule that drops it; null where kept
        ("would_drop", pa.list_(pa.string())),  # every rule that drops it on its own
        ("texts", pa.list_(KEPT_TEXT)),  # what training may read; probability null where nothing matched them
    ]
)

TRAINING = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("url_key", pa.string()),
        ("source", pa.string()),
        ("increment", pa.string()),
        ("trusted", pa.bool_()),
        ("status", pa.string()),
        ("text", pa.string()),
        ("texts", pa.list_(KEPT_TEXT)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_ext", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ]
)

TOMBSTONES = pa.schema([("kind", pa.string()), ("id", pa.string()), ("reason", pa.string())])  # kind: workspace.KINDS
