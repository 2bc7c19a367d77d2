"""Say what a file is that is not read as a photo, by its suffix and its first bytes."""

from pathlib import Path

# Cameras' own formats. Of many Pillow would read a thumbnail, as they begin like TIFF.
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".raf", ".orf")
RAW_SUFFIXES += (".rw2", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".raw")
NOT_READ = (".heic", ".heif", ".hif", ".jxl", *RAW_SUFFIXES)  # photos, but not ours to read
RAW, HEIC, JXL = (f"{kind}: export it as JPEG" for kind in ("a camera's raw file", "HEIC", "JPEG XL"))
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"8BPS": "PSD",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": JXL,
    b"\xff\x0a": JXL,
    b"%PDF": "PDF",
    b"PK\x03\x04": "ZIP",
    b"version https://git-lfs": "a git-lfs pointer, not the file: run `git lfs pull`",
    b"<": "a web page, or other XML",
}
# Of ISO base media files, which begin with a length, "ftyp" and one of these.
BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), HEIC),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    b"crx ": RAW,
}


def describe(path: Path) -> str:
    """Return what a file seems to be, and its size, for an error message."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    if not head:
        return "empty"
    kind = next((name for start, name in SIGNATURES.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        kind = BRANDS.get(head[8:12], "video")
    elif head.startswith(b"RIFF"):
        kind = "WebP" if head[8:12] == b"WEBP" else "sound or video"
    if kind is None and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        kind = "text"
    return f"{kind or f'unknown, beginning with {head[:8]!r}'}, {path.stat().st_size} bytes"
