"""What counts as an image: every accepted kind becomes one [H, W, 3] uint8 RGB array, or an `ImageError` that names it.

Conventions, so that the same picture gives the same pixels whichever way it is handed over:

- NumPy arrays are BGR, BGRA or grey, as OpenCV makes them; PIL images are what their mode says.
- Files and encoded bytes are turned upright by their EXIF orientation, as `cv2.imread` does. A PIL image is not turned:
  boxes belong to the pixel grid that the caller holds.
- Transparency is ignored: the colours under it count, as with `cv2.imread` and Pillow's `convert("RGB")`.
- Of 16-bit samples the high byte counts, as with Pillow and `cv2.imread`. Embedded colour profiles are ignored.
- Of an animation, the first frame counts (of an open PIL image, its current frame).

Downloading is left to `moondream_cv.downloads`; resizing, cropping and lists of images are left to others. OpenCV and
torch are not needed.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from moondream_cv.errors import ImageError
from moondream_cv.escaping import escaped
from moondream_cv.urls import is_url, shown_url

ImageInput: TypeAlias = (
    npt.NDArray[Any] | Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
)
"""A BGR array, a PIL image, a path, a URL, the bytes of an image file, or a file object opened for reading bytes."""

DEFAULT_MAX_PIXELS = 178_956_970
"""512 MiB of RGB, more than any camera's sensor gives; above it Pillow with its own defaults refuses a file too."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"}
    | {".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Suffixes of the image files that are read from a folder; files in any of `FORMATS` can be given by name."""

_LONGEST_PATH = 4096  # PATH_MAX of Linux; longer text is the picture itself, in base64
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})

# Pillow has decoders for 40 more formats. Among them are containers that open another image by themselves, with every
# decoder there is, Ghostscript included, and formats that take minutes to decode from a few bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF", "ICO", "PPM", "TGA")
"""Formats that are decoded, by Pillow's names. AVIF needs Pillow 11.3, and HEIF needs `pillow-heif`."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ICON_SIGNATURE = b"\x00\x00\x01\x00"
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_J2K_START = b"\xff\x4f\xff\x51"  # the markers SOC and SIZ, with which every JPEG 2000 codestream begins

_UPRIGHT = {  # EXIF orientation → what turns the stored picture upright; 1 needs nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: ImageInput, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image of any accepted kind.

    Args:
        image: One of
            an array [H, W], [H, W, 1] (grey), [H, W, 3] (BGR) or [H, W, 4] (BGRA), of any strides, of dtype uint8,
            uint16 (0 to 65535), bool (black and white) or float (0 to 1);
            a PIL image of any mode;
            a path (`~` is expanded), an http or https URL, which is downloaded, the bytes of an image file, or an open
            binary file, which is read to its end and not closed.
        max_pixels: The largest width times height that is accepted. Files are checked by their header, before decoding.

    Returns:
        The pixels, [H, W, 3], uint8, RGB, C-contiguous; never a view of the caller's memory.

    Raises:
        ImageError: The image cannot be read or downloaded, has no pixels or too many, or is of a kind, shape, dtype or
            range that is not listed above.
    """
    if isinstance(image, np.ndarray):
        return _array_to_rgb(np.asarray(image), max_pixels)
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image, max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _encoded_to_rgb(bytes(image), max_pixels)
    if isinstance(image, (str, os.PathLike)):
        return _path_to_rgb(os.fsdecode(image), max_pixels)
    if hasattr(image, "read"):
        return _file_to_rgb(image, max_pixels)
    shown = " ".join(_shown(image).split())  # tensors fill several lines
    raise ImageError(f"{shown} (of type {type(image).__name__}) is not an image; {_advice(image)}")


def is_encoded(image: object) -> bool:
    """Whether a model has made this of an image: it says its size, and is none of the kinds that `to_rgb` reads."""
    if isinstance(image, (np.ndarray, Image.Image)) or hasattr(image, "read") or hasattr(image, "numpy"):
        return False
    size = getattr(image, "size", None)
    return isinstance(size, tuple) and len(size) == 2


def _array_to_rgb(array: npt.NDArray[Any], max_pixels: int) -> npt.NDArray[np.uint8]:
    name = f"the array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim == 1 and array.dtype == np.uint8:
        raise ImageError(f"{name} has no height and width; if it holds an encoded file, pass array.tobytes()")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        raise ImageError(f"{name} has its channels first; pass array.transpose(1, 2, 0), in BGR order")
    if array.ndim == 4:
        raise ImageError(f"{name} is a batch; pass its frames as a list, list(array)")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} is not an image; expected [H, W], [H, W, 1], [H, W, 3] (BGR) or [H, W, 4] (BGRA)")
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    if array.ndim == 3 and array.shape[2] != 1:
        return _to_uint8(np.take(array, (2, 1, 0), axis=2), name)  # BGR(A) → RGB; copying a reversed view is slower
    return np.repeat(_to_uint8(array.reshape(*array.shape[:2], 1), name), 3, axis=2)


def _to_uint8(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    kind, width = values.dtype.kind, values.dtype.itemsize
    if kind == "u" and width == 1:
        return values.view(np.uint8)
    if kind == "u" and width == 2:
        return (values >> 8).astype(np.uint8)
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind == "f":
        low, high = _finite_range(values, name)
        if low < 0 or high > 1:
            raise ImageError(
                f"{name} has values from {low:g} to {high:g}; floats are read as 0 to 1, so divide them or pass uint8"
            )
        scaled: npt.NDArray[np.uint8] = np.rint(values * 255).astype(np.uint8)
        return scaled
    raise ImageError(f"{name} has a dtype that images do not have; convert it to uint8 (0 to 255) first")


def _finite_range(values: npt.NDArray[Any], name: str) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ImageError(f"{name} has values that are not finite (NaN or infinite)")
    return low, high


def _pil_to_rgb(picture: Image.Image, max_pixels: int) -> npt.NDArray[np.uint8]:
    name = f"the PIL image {_shown(picture)}"
    _check_size(*picture.size, name, max_pixels)
    try:
        picture.load()  # an image fresh from Image.open is still undecoded
        return _pixels(picture, name)
    except ImageError:
        raise
    except Exception as error:  # as in _decode
        raise ImageError(f"{name} cannot be read: {_reason(error)}") from error


def _pixels(picture: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    """Return the pixels of a decoded PIL image as it lies, [H, W, 3] RGB."""
    mode = picture.mode
    if mode.startswith("I;16"):
        return np.repeat(_to_uint8(np.asarray(picture)[..., None], name), 3, axis=2)
    if mode in ("I", "F"):
        return np.repeat(_rangeless_to_uint8(np.asarray(picture)[..., None], name), 3, axis=2)
    if mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns about the transparency that is dropped
    elif mode == "La":
        picture = picture.convert("LA")  # the only mode without a direct way
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"), order="C")


def _rangeless_to_uint8(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Scale Pillow's modes I and F, whose range only the values tell.

    It is 0 to 255 as Pillow's `convert` makes them, 0 to 1 in mode F, or 16 bit in mode I (PGM; PNG in older Pillow).
    """
    low, high = _finite_range(values, name)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return _to_uint8(values, name)
    if low >= 0 and high <= 255:
        rounded: npt.NDArray[np.uint8] = np.rint(values).astype(np.uint8)
        return rounded
    if values.dtype.kind == "i" and low >= 0 and high <= 65535:
        return _to_uint8(values.astype(np.uint16), name)
    raise ImageError(f"{name} has values from {low:g} to {high:g}; scale them to 0 to 255 first")


def check_image_file(image: str | os.PathLike[str] | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Check an image file by its header, without decoding it.

    Args:
        image: A path or the bytes of an image file. Only the form of a URL is checked.
        max_pixels: As for `to_rgb`.

    Raises:
        ImageError: The file is missing, is not a regular file, is not an image in one of `FORMATS`, or is too large.
    """
    if isinstance(image, bytes):
        with _opened_nonempty(io.BytesIO(image), _encoded_name(image), max_pixels):
            return
    path = os.fsdecode(image)
    if is_url(path):
        from moondream_cv.downloads import check_image_url

        check_image_url(path)
        return
    with _opened_path(path) as file, _opened_nonempty(file, _shown_path(path), max_pixels):
        pass


def _path_to_rgb(path: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    if is_url(path):
        from moondream_cv.downloads import download_image

        return _decode(io.BytesIO(download_image(path)), f"the image at {shown_url(path)!r}", max_pixels)
    with _opened_path(path) as file:
        return _decode(file, _shown_path(path), max_pixels)


@contextlib.contextmanager
def _opened_path(path: str) -> Iterator[IO[bytes]]:
    """Open a regular file for the length of a `with`.

    Raises:
        ImageError: There is no such file, or it cannot be opened or read.
    """
    name = _shown_path(path)
    if path.startswith("data:") or len(path) > _LONGEST_PATH:
        raise ImageError(f"{name} is not a path; base64 text is passed as bytes, after base64.b64decode")
    try:
        file = Path(path).expanduser()
        if not path or not file.exists():
            raise ImageError(f"{name}: no such image file")
        if file.is_dir():
            raise ImageError(f"{name} is a folder; pass the images in it one by one")
        if not file.is_file():  # opening a pipe or a device could block for ever
            raise ImageError(f"{name} is not a regular file; read it and pass the bytes")
        with file.open("rb") as opened:
            yield opened
    except (OSError, RuntimeError, ValueError) as error:  # permissions, "~nobody", a NUL in the path
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be opened: {_reason(error)}") from error


def _encoded_to_rgb(encoded: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    return _decode(io.BytesIO(encoded), _encoded_name(encoded), max_pixels)


def _encoded_name(encoded: bytes) -> str:
    return f"the encoded image of {len(encoded)} bytes"


def _file_to_rgb(file: IO[bytes], max_pixels: int) -> npt.NDArray[np.uint8]:
    path = getattr(file, "name", None)  # a string for an opened file, a number for a pipe
    name = f"the file object of {_shown_path(path)}" if isinstance(path, str) else "the file object"
    try:
        encoded: object = file.read()
    except Exception as error:  # file-like objects raise whatever their makers chose
        raise ImageError(f"{name} cannot be read: {_reason(error)}") from error
    if not isinstance(encoded, (bytes, bytearray, memoryview)):
        raise ImageError(f"{name} gives {type(encoded).__name__}, not bytes; open it in binary mode, 'rb'")
    if not encoded:
        raise ImageError(f"{name} is empty or was read before; call seek(0) to read it again")
    return _decode(io.BytesIO(encoded), f"{name}, {len(encoded)} bytes,", max_pixels)


def _decode(file: IO[bytes], name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    with _opened_nonempty(file, name, max_pixels) as picture:
        return _pixels(upright_image(picture, name, max_pixels), name)


@contextlib.contextmanager
def _opened_nonempty(file: IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    if not file.read(1):
        raise ImageError(f"{name} is empty (0 bytes)")
    with opened_image(file, name, max_pixels) as picture:
        yield picture


@contextlib.contextmanager
def opened_image(file: IO[bytes], name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file in one of `FORMATS`, undecoded, for the length of a `with`.

    Args:
        file: A file object in binary mode.
        name: Name of the file in messages.
        max_pixels: As for `to_rgb`.

    Raises:
        ImageError: The file is not an image, needs a decoder that is not installed, is too large, or an error occurs in
            the `with` while it is decoded.
    """
    with decoding_errors(name):
        for width, height in _declared_sizes(file):
            _check_size(width, height, name, max_pixels)
        file.seek(0)
        try:
            picture = open_image(file)
        except UnidentifiedImageError as error:
            missing = _missing_decoder(file)
            if missing is None:
                raise
            raise ImageError(f"{name} {missing}, or convert it to PNG") from error
        with picture:
            yield picture


def upright_image(picture: Image.Image, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode the current frame of an opened image file, and return it upright.

    Args:
        picture: From `opened_image`, at any of its frames.
        name: Name of the file in messages.
        max_pixels: As for `to_rgb`; checked before decoding.

    Raises:
        ImageError: It has no pixels or too many. Pillow's own errors are passed on, for `decoding_errors`.
    """
    _check_size(*picture.size, name, max_pixels)
    for width, height in _tile_sizes(picture):
        _check_size(width, height, name, max_pixels)
    picture.load()
    orientation = _orientation(picture)  # after load, because Pillow turns a TIFF itself
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


@contextlib.contextmanager
def decoding_errors(name: str) -> Iterator[None]:
    """Turn what Pillow raises while it decodes a file in the `with` into an `ImageError` that names the file."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(readable_formats())
        raise ImageError(f"{name} is not an image in a supported format ({known}); convert it to PNG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large: {error}; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # damaged data makes Pillow raise OSError, SyntaxError, struct.error, IndexError...
        raise ImageError(f"{name} is truncated or damaged: {_reason(error)}") from error


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image file with Pillow, undecoded, if it is in one of `FORMATS`.

    Every image file is opened here, so that no other decoder ever sees it.

    Args:
        file: A file object in binary mode, at its start.

    Raises:
        UnidentifiedImageError: The format is not one of `FORMATS`.
    """
    return Image.open(file, formats=readable_formats())


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this installation can decode."""
    Image.init()
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _missing_decoder(file: IO[bytes]) -> str | None:
    """Return what to install for a file in one of `FORMATS` that this installation cannot decode; None for others."""
    file.seek(0)
    head = file.read(64)
    if head[4:8] == b"ftyp":
        length = min(64, int.from_bytes(head[:4], "big"))
        brands = {head[8:12], *(head[start : start + 4] for start in range(16, length, 4))}
        if brands & _AVIF_BRANDS and "AVIF" not in readable_formats():
            return 'is an AVIF image, which this Pillow cannot decode; pip install "pillow>=11.3"'
        if brands & _HEIF_BRANDS and "HEIF" not in readable_formats():
            return "is a HEIC or HEIF image, which needs the package pillow-heif; pip install pillow-heif"
    if (head.startswith(_J2K_START) or head[:12] == _JP2_SIGNATURE) and "JPEG2000" not in readable_formats():
        return "is a JPEG 2000 image, which this Pillow cannot decode; pip install --force-reinstall pillow"
    return None


def _declared_sizes(content: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the (width, height) of images inside a file that `Image.open` would decode, or whose size it would hide."""
    content.seek(0)
    start = content.read(12)
    with contextlib.suppress(struct.error):  # a truncated file, which the decoder reports
        if start.startswith(_ICON_SIGNATURE):
            yield from _icon_sizes(content)
        elif start.startswith(_J2K_START) or start == _JP2_SIGNATURE:
            yield from _codestream_sizes(content)


def _icon_sizes(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the sizes in the headers of an icon's images: its directory states them once more, modulo 256."""
    file.seek(4)
    (count,) = struct.unpack("<H", file.read(2))
    entries = [struct.unpack("<12xI", file.read(16)) for _ in range(count)]
    for (offset,) in entries:
        file.seek(offset)
        header = file.read(24)  # of a PNG, or of a bitmap without a file header
        if header.startswith(_PNG_SIGNATURE):
            if header[12:16] != b"IHDR":
                raise UnidentifiedImageError
            width, height = struct.unpack(">16xII", header)
            yield width, height
        else:
            width, height = struct.unpack("<4xii12x", header)
            yield abs(width), abs(height) // 2  # a mask of the same size follows the pixels


def _codestream_sizes(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the sizes that the codestreams of a JPEG 2000 file state; the boxes around them may state another one."""
    file.seek(0)
    content = file.read()
    start = content.find(_J2K_START)
    while start >= 0:
        header = content[start + 8 : start + 24]
        if len(header) == 16:
            right, bottom, left, top = struct.unpack(">IIII", header)
            yield max(1, right - left), max(1, bottom - top)
        start = content.find(_J2K_START, start + 4)


def _tile_sizes(picture: Image.Image) -> Iterator[tuple[int, int]]:
    """Yield the size of a TIFF's tiles: a whole one is allocated, even if it is larger than the image."""
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    width, height = tags.get(322), tags.get(323)  # TileWidth, TileLength
    if isinstance(width, int) and isinstance(height, int):
        yield max(1, width), max(1, height)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data in a sound picture; every viewer shows it as it lies
        return 1


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: it is {width} wide and {height} high")
    if width * height > max_pixels:
        raise ImageError(f"{name} is too large: {width}x{height} pixels, the limit is {max_pixels:,}; shrink it first")


def _advice(image: object) -> str:
    if hasattr(image, "numpy"):  # a tensor of any framework
        return "pass tensor.numpy() from the CPU, as [H, W, 3] uint8 in BGR order"
    if isinstance(image, (list, tuple)):
        return "pass one image at a time"
    return "pass a BGR NumPy array, a PIL image, a path, a URL, the bytes of an image file or a binary file object"


def _shown_path(path: str) -> str:
    """Return a path in quotes as the user wrote it: backslashes are not doubled, as `repr` would."""
    text = escaped(path)
    return f"'{text}'" if len(text) <= 300 else f"'{text[:280]}...' ({len(text)} characters)"


def _shown(value: object) -> str:
    """Return the repr of a value, shortened so that it fits in a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)  # without the path, which is named
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
