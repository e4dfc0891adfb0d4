"""`decode`: every kind of image file comes out as the picture people see, everything else as `BadImage`."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, features

from dino.data import decode as decoding
from dino.data.decode import IMAGE_SUFFIXES, BadImage, decode

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth color picture in which no two corners look alike, [h, w, 3] uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 127 // (width + height)], -1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, color: int = 2) -> bytes:
    """A PNG file made by hand, so that its header may lie."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, data: bytes, **tags: int) -> bytes:
    """A gray TIFF file made by hand, without compression; `tags` by number, as t258=12, come on top."""
    known = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    known |= {int(name[1:]): value for name, value in tags.items()}
    data += bytes(len(data) % 2)
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(known.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(known)) + entries + bytes(4)


def reason(data: bytes | str | Path, **options) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    assert caught.value.reason == str(caught.value)
    assert len(caught.value.reason) < 130
    assert "\n" not in caught.value.reason
    return caught.value.reason


# ---- kinds of image


@pytest.mark.parametrize("kind", FORMATS)
def test_color_from_path_and_bytes(kind: str, tmp_path: Path) -> None:
    data = encode(Image.fromarray(picture()), kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "wrong suffix.png"  # the content decides, not the name
    path.write_bytes(data)
    out = decode(data)
    assert out.shape == (40, 60, 3)
    assert out.dtype == np.uint8
    assert out.flags.writeable
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, decode(path))
    np.testing.assert_array_equal(out, decode(str(path)))
    error = np.abs(out.astype(int) - picture()).max()
    assert error <= (0 if kind in ("PNG", "BMP", "TIFF", "WEBP") else 40)
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"} <= IMAGE_SUFFIXES


def test_huge_files_are_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(encode(Image.fromarray(picture()), "PNG"))
    os.truncate(path, 2**36)  # a sparse file; reading it whole would take 64 GB of memory
    np.testing.assert_array_equal(decode(path), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(picture()), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode(data).shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))
    np.testing.assert_array_equal(decode(data), np.asarray(expected))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert (
        decode(data)[corner[orientation]].max() < 30
    )  # the dark corner of the stored picture, where a viewer shows it


def test_damaged_exif_is_no_damaged_image() -> None:
    for block in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x05ab",
        b"Exif\0\0",
        b"Exif\0\0no TIFF at all",
    ):
        assert decode(encode(Image.fromarray(picture()), "JPEG", exif=block)).shape == (40, 60, 3)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nnot hexadecimal")
    np.testing.assert_array_equal(decode(encode(Image.fromarray(picture()), "PNG", pnginfo=text)), picture())


def test_gray_and_one_bit() -> None:
    gray = picture()[..., 0]
    np.testing.assert_array_equal(decode(encode(Image.fromarray(gray), "PNG")), np.repeat(gray[..., None], 3, -1))
    bits = Image.fromarray(gray > 100)
    assert bits.mode == "1"
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(encode(bits, kind))[..., 1], np.where(gray > 100, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_full_range(kind: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.fromarray(ramp.astype(np.int32)).convert("I;16")
    np.testing.assert_array_equal(np.asarray(image), ramp)
    out = decode(encode(image, kind))
    np.testing.assert_array_equal(out[..., 0], np.rint(ramp / 257).astype(np.uint8))
    np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_16_bit_gray_with_a_transparent_value() -> None:
    image = Image.fromarray(np.array([[0, 1000], [40000, 65535]], np.int32)).convert("I;16")
    np.testing.assert_array_equal(decode(encode(image, "PNG", transparency=1000))[..., 0], [[0, 255], [156, 255]])


def test_32_bit_gray_is_stretched() -> None:
    ramp = np.linspace(-3, 5, 256).reshape(16, 16)
    for values in (ramp.astype(np.float32), (ramp * 1e5).astype(np.int32), (ramp * 1e37).astype(np.float32)):
        out = decode(encode(Image.fromarray(values), "TIFF"))
        np.testing.assert_array_equal(out[..., 0].ravel(), np.arange(256))
    assert decode(encode(Image.fromarray(np.full((3, 4), 7, np.float32)), "TIFF")).max() == 0
    odd = np.array([[np.nan, -np.inf], [np.inf, 1.0]], np.float32)
    odd = np.concatenate([odd, np.zeros((1, 2), np.float32)])
    np.testing.assert_array_equal(decode(encode(Image.fromarray(odd), "TIFF"))[..., 0], [[0, 0], [255, 255], [0, 0]])
    signaling = np.array([[0x7F800001, 0, 0x3F800000]], np.uint32).view(np.float32)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(signaling), "TIFF"))[..., 0], [[0, 0, 255]])
    assert reason(encode(Image.fromarray(np.full((3, 4), np.nan, np.float32)), "TIFF")) == "no finite pixel"


def test_alpha_is_composited_on_white() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)  # noise hidden under the clear pixels
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 255
    share = rgba[..., 3:] / 255
    white = rgba[..., :3] * share + 255 * (1 - share)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        out = decode(encode(Image.fromarray(rgba), kind, **options))
        assert (out[0] == 255).all()
        np.testing.assert_array_equal(out[1], rgba[1, :, :3])
        assert np.abs(out - white).max() <= 1
    gray = decode(encode(Image.fromarray(rgba[..., 2:]), "PNG"))  # LA
    assert np.abs(gray - white[..., 2:]).max() <= 1


def test_palettes() -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.putdata([0, 1, 2, 3, 3, 2, 1, 0])
    plain = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    plain = np.stack([plain, plain[::-1]])
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encode(image, kind)), plain)
    clear = plain.copy()
    clear[0, 1] = clear[1, 2] = 255
    for kind in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode(encode(image, kind, transparency=1)), clear)
    shades = decode(encode(image, "PNG", transparency=bytes([255, 0, 128, 255])))
    np.testing.assert_array_equal(shades[0], [[255, 0, 0], [255, 255, 255], [127, 127, 255], [9, 9, 9]])


def test_a_transparent_color_without_alpha() -> None:
    rgb = picture(4, 4)
    rgb[2, 2] = (1, 2, 3)
    out = decode(encode(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)))
    rgb[2, 2] = 255
    np.testing.assert_array_equal(out, rgb)
    gray = Image.fromarray(np.array([[5, 6]], np.uint8))
    np.testing.assert_array_equal(decode(encode(gray, "PNG", transparency=6))[0, :, 0], [5, 255])


def test_other_color_spaces() -> None:
    kinds = [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")]
    if int(PIL.__version__.partition(".")[0]) >= 13:  # older ones cannot read what they write
        kinds.append(("YCbCr", "TIFF"))
    for mode, kind in kinds:
        image = Image.fromarray(np.full((16, 16, 3), (200, 60, 90), np.uint8)).convert(mode)
        out = decode(encode(image, kind))  # Pillow writes CMYK JPEGs as Adobe does: inverted
        assert np.abs(out.astype(int) - (200, 60, 90)).max() <= 6, (mode, kind)


def test_16_bit_color() -> None:
    row = b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0x0100, 0xFE00)
    np.testing.assert_array_equal(decode(png(2, 1, row, depth=16)), [[[0, 0x80, 0xFF], [0x12, 0x01, 0xFE]]])


def test_12_bit_gray_and_another_byte_order() -> None:
    packed = int("".join(f"{value:012b}" for value in (0, 1365, 2730, 4095)), 2).to_bytes(6)
    assert decode(tiff(4, 1, packed, t258=12))[0, :, 0].tolist() == [0, 85, 170, 255]
    big_endian = Image.frombytes("I;16B", (2, 2), np.array([[0, 1000], [40000, 65535]], ">u2").tobytes())
    assert decode(encode(big_endian, "TIFF"))[..., 0].tolist() == [[0, 4], [156, 255]]


def test_large_images_are_converted_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Image.fromarray(picture(90, 70))
    modes = ["RGB", "RGBA", "LA", "L", "P", "1", "I;16", "I", "F", "CMYK", "LAB"]
    files = [encode(whole.convert(mode), "TIFF") for mode in modes]
    files += [encode(whole.convert("P"), "PNG", transparency=bytes(range(256)))]
    files += [encode(whole.convert("I;16"), "PNG", transparency=1000)]
    expected = [decode(data) for data in files]
    monkeypatch.setattr(decoding, "_BAND", 70 * 7)
    for data, pixels in zip(files, expected, strict=True):
        np.testing.assert_array_equal(decode(data), pixels)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's records of memory")
@pytest.mark.parametrize(("mode", "kind"), [("F", "TIFF"), ("I;16", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG")])
def test_an_image_takes_memory_of_its_own_order(mode: str, kind: str, tmp_path: Path) -> None:
    """Its pixels as RGB take 3 bytes each, Pillow's copy of them 4."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"JPEG": {"exif": exif}, "TIFF": {"compression": "tiff_adobe_deflate"}}.get(kind, {})
    data = encode(Image.new(mode, (3000, 3000)), kind, **options)
    (tmp_path / "image").write_bytes(data)
    script = """if True:
        import pathlib, re, sys
        from dino.data.decode import decode
        def read(key):
            return int(re.search(key + r":\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
        before = read("VmRSS")
        decode(sys.argv[1])
        print(read("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "image"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 13 * 3000**2


@pytest.mark.skipif(".heic" not in IMAGE_SUFFIXES, reason="needs pillow-heif")
def test_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    assert {".heif", ".hif"} <= IMAGE_SUFFIXES
    turned, exif, buffer = Image.fromarray(picture()), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    pillow_heif.register_heif_opener()
    turned.save(buffer, "HEIF", quality=100)
    data = buffer.getvalue()
    assert np.abs(decode(data).astype(int) - np.rot90(picture(), -1)).max() < 12  # not turned twice
    assert reason(data[:-100]).split(" (")[0] in ("truncated", "damaged")
    monkeypatch.setattr(decoding, "IMAGE_SUFFIXES", frozenset())  # as without pillow-heif
    assert reason(data) == "HEIC, to be read after: pip install 'dino-vision[heif]'"


def test_avif(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (".avif" in IMAGE_SUFFIXES) == bool(features.check("avif"))
    if ".avif" in IMAGE_SUFFIXES:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(Image.fromarray(picture()), "AVIF", quality=100, exif=exif)
        assert np.abs(decode(data).astype(int) - np.rot90(picture(), -1)).max() < 12
    monkeypatch.setattr(decoding, "IMAGE_SUFFIXES", frozenset())  # as with an older Pillow
    assert "pip install -U pillow" in reason(b"\0\0\0 ftypavif\0\0\0\0avifmif1miaf")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_many(kind: str) -> None:
    colors = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    frames = [Image.new("RGB", (12, 9), color) for color in colors]
    out = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert out.shape == (9, 12, 3)
    assert np.abs(out.astype(int) - colors[0]).max() <= 12


# ---- files that are not images


def test_reasons(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("an HTML page, saved as a picture")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "empty.jpg") == "empty file"
    assert reason(tmp_path / "text.jpg").startswith("not an image")
    assert reason(tmp_path / "folder.jpg") == "not a regular file"
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(tmp_path / "gone.jpg") == "no such file or directory"
    assert reason(tmp_path / "text.jpg" / "x.jpg") == "not a directory"
    assert reason(b"") == "empty file"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not an image")
    assert reason("nul\0byte.jpg").startswith("damaged")
    for head in (b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"\x89PNG\r\n\x1a\n"):
        assert reason(head).split(" (")[0] in ("damaged", "truncated"), head


def test_sound_files_of_an_unsupported_kind_are_not_called_damaged() -> None:
    jpeg = bytearray(encode(Image.fromarray(picture()), "JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12  # bits of a color
    bmp = bytearray(encode(Image.fromarray(picture()).convert("L"), "BMP"))
    bmp[28] = 2
    floats = cv2.imencode(".tif", np.ones((4, 4, 3), np.float32))[1].tobytes()
    for data, kind in ((bytes(jpeg), "JPEG"), (bytes(bmp), "BMP"), (floats, "TIFF")):
        assert reason(data).startswith(f"an unsupported kind of {kind}: convert it to 8-bit color (")
    webp = encode(Image.fromarray(picture()), "WEBP")
    for data in (tiff(60, 40, webp, t259=50001), tiff(60, 40, bytes(3600), t262=6, t277=3)):  # WebP in it; YCbCr
        assert "an unsupported kind of TIFF: convert it to 8-bit color" in reason(data)
    assert reason(b"RIFF\x24\0\0\0WAVEfmt ").startswith("not an image")
    assert reason(b"\0\0\0 ftypisom\0\0\2\0isomiso2avc1mp41").startswith("not an image")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    (tmp_path / "closed.jpg").touch(0)
    assert reason(tmp_path / "closed.jpg") == "permission denied"


def test_the_reason_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(BadImage("empty file")))
    assert (again.reason, str(again)) == ("empty file", "empty file")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tenth", range(10))
def test_truncation(kind: str, tenth: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), kind)
    cut = data[: len(data) * tenth // 10]
    assert reason(cut).split(" (")[0] in ("empty file", "truncated", "damaged", "not an image")


def test_large_text_in_a_png_is_no_obstacle() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "y" * 2_000_000, zip=True)
    data = encode(Image.fromarray(picture()), "PNG", pnginfo=text, icc_profile=bytes(1_500_000))
    np.testing.assert_array_equal(decode(data), picture())
    text.add_text("bomb", "x" * (2**26 + 1), zip=True)
    assert reason(encode(Image.fromarray(picture()), "PNG", pnginfo=text)) == "more than 64 MB of text in it"


def test_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(png(60000, 60000)).startswith("too many pixels")
    assert reason(png(14000, 14000)).startswith("too many pixels")
    assert reason(png(1, 2**31 - 1)).startswith("too many pixels")
    assert reason(png(10000, 10000), max_pixels=10**7) == "too many pixels (10000 x 10000, limit 10000000)"
    assert decode(png(16, 1, b"\0" + b"\x07" * 48), max_pixels=16).shape == (1, 16, 3)
    assert reason(png(14000, 14000)).endswith("limit 178956970, which DINO_MAX_PIXELS sets)")
    monkeypatch.setenv("DINO_MAX_PIXELS", str(14000**2))
    assert reason(png(14000, 14000, depth=1, color=0)) == "truncated"
    monkeypatch.setenv("DINO_MAX_PIXELS", "15")
    assert reason(png(16, 1)).startswith("too many pixels (16 x 1, limit 15, ")
    monkeypatch.setenv("DINO_MAX_PIXELS", "many")
    assert reason(png(16, 1)) == "DINO_MAX_PIXELS is many, which is no number of pixels"
    assert reason(png(0, 5)).split(" (")[0] == "damaged"


def test_large_images_are_decoded_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # the picture has 2400 pixels: between warning and error
    data = encode(Image.fromarray(picture()), "PNG")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode(data), picture())


def test_global_state_is_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    decode(encode(Image.fromarray(picture()), "JPEG"))
    reason(b"junk")
    assert before == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))


def test_threads() -> None:
    data = [encode(Image.fromarray(picture(90 + i, 80)), FORMATS[i % 6]) for i in range(12)]
    expected = [decode(item) for item in data]
    failures: list[str] = []

    def work() -> None:
        for item, target in zip(data * 5, expected * 5, strict=True):
            if not np.array_equal(decode(item), target):
                failures.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    with warnings.catch_warnings():  # threads may restore each other's warning filters
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


# ---- properties

SAMPLES = [
    *(encode(Image.fromarray(picture()), kind) for kind in FORMATS),
    encode(
        Image.fromarray(picture()),
        "JPEG",
        progressive=True,
        exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0",
    ),
    encode(Image.fromarray(picture()), "TIFF", compression="tiff_lzw"),
    encode(Image.fromarray(picture()), "TIFF", compression="jpeg"),
    encode(Image.fromarray(picture()).convert("P"), "PNG", transparency=bytes(range(256))),
    encode(Image.fromarray(picture()), "GIF", save_all=True, append_images=[Image.fromarray(picture()[::-1].copy())]),
    encode(Image.fromarray(picture()), "PNG", save_all=True, append_images=[Image.fromarray(picture()[::-1].copy())]),
]


def image_or_reason(data: bytes) -> np.ndarray | None:
    """What every input must give: an array of the promised kind or BadImage (any other exception fails the test)."""
    try:
        out = decode(data, max_pixels=10**6)
    except BadImage:
        return None
    assert out.dtype == np.uint8
    assert out.ndim == 3
    assert out.shape[2] == 3
    assert out.size > 0
    return out


@given(st.binary(max_size=200), st.sampled_from([b"", *(sample[:40] for sample in SAMPLES)]))
def test_any_bytes(tail: bytes, head: bytes) -> None:
    image_or_reason(head + tail)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.floats(0, 1, exclude_max=True))
def test_any_truncation(data: bytes, share: float) -> None:
    out = image_or_reason(data[: int(len(data) * share)])
    assert out is None or out.shape == (40, 60, 3) or out.shape == (60, 40, 3)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_any_damage(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % min(len(data), 400)] = value  # headers are where parsers break
    image_or_reason(bytes(damaged))


def pillow(data: bytes) -> np.ndarray | None:
    try:
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError):
        return None


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["L", "4:4:4", "4:2:2", "4:2:0", "stored as RGB"]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.fixed_dictionaries(
        {"quality": st.integers(1, 100)},
        optional={"progressive": st.just(True), "restart_marker_blocks": st.integers(1, 4)},
    ),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.integers(0, 30),
    st.integers(0, 2**32 - 1),
)
def test_jpegs_are_what_pillow_makes_of_them(
    colors: str, size: tuple[int, int], options: dict, changes: list[tuple[float, int]], cut: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) // 4
    image = Image.fromarray(noise + picture(*size) // 2)
    if colors == "L":
        image = image.convert("L")
    else:
        options |= {"keep_rgb": True} if colors == "stored as RGB" else {"subsampling": colors}
    data = bytearray(encode(image, "JPEG", **options))
    start = data.index(b"\xff\xda")  # the pixels: a fault in front of them is what `test_any_damage` tries
    for place, value in changes:
        data[start + int(place * (len(data) - start))] = value
    data = bytes(data[: max(start, len(data) - cut)])
    expected, out = pillow(data), image_or_reason(data)
    assert (out is None) == (expected is None)
    if out is not None and expected is not None:
        np.testing.assert_array_equal(out, expected)


@pytest.mark.skipif("DINO_DATA" not in os.environ, reason="needs DINO_DATA, a folder with real images")
def test_real_images() -> None:
    files = [path for path in sorted(Path(os.environ["DINO_DATA"]).rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in files[:: max(1, len(files) // 200)]:
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        np.testing.assert_array_equal(decode(path), expected)
