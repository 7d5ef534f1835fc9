"""Image input: converts every accepted type of image to an [H, W, 3] uint8 RGB array, or raises an `ImageError`.

The same image has the same pixels in every type:

- NumPy arrays are BGR, BGRA or gray, as in OpenCV. PIL images have the channels of their mode.
- Files and encoded bytes are rotated by their EXIF orientation, as by `cv2.imread`. PIL images are not rotated: boxes
  refer to the pixels of the caller's image.
- Alpha channels are dropped, as by `cv2.imread` and Pillow's `convert("RGB")`.
- 16-bit samples keep their high byte, as in Pillow and `cv2.imread`. Embedded color profiles are ignored.
- Animations use their first frame; open PIL images use their current frame.

Neither OpenCV nor torch is required.
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
"""Maximum number of pixels of an image: 512 MiB of RGB, the default limit of Pillow."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"}
    | {".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Suffixes of image files in a folder. A file given by name may have any suffix."""

_LONGEST_PATH = 4096  # PATH_MAX of Linux; longer text is probably an image in base64
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})

# Pillow decodes 40 more formats. Some are containers that open other images with any decoder, including Ghostscript,
# and some take minutes to decode a few bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF", "ICO", "PPM", "TGA")
"""Accepted file formats, by their names in Pillow. AVIF needs Pillow 11.3, and HEIF needs `pillow-heif`."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ICON_SIGNATURE = b"\x00\x00\x01\x00"
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_J2K_START = b"\xff\x4f\xff\x51"  # markers SOC and SIZ, the start of every JPEG 2000 codestream

_UPRIGHT = {  # EXIF orientation → transformation to upright; 1 needs none
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: ImageInput, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image of any accepted type.

    Args:
        image: One of:
            an array [H, W], [H, W, 1] (gray), [H, W, 3] (BGR) or [H, W, 4] (BGRA) of any strides, with dtype uint8,
            uint16 (0 to 65535), bool (black and white) or float (0 to 1);
            a PIL image of any mode;
            a path (`~` is expanded), an http or https URL, which is downloaded, the bytes of an image file, or an open
            binary file, which is read to its end and not closed.
        max_pixels: Maximum width times height. Files are checked by their header, before decoding.

    Returns:
        RGB pixels [H, W, 3], uint8, C-contiguous, in newly allocated memory.

    Raises:
        ImageError: The image cannot be read or downloaded, has no pixels or too many, or has another type, shape, dtype
            or value range.
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
    shown = " ".join(_shown(image).split())  # the repr of a tensor has several lines
    raise ImageError(f"{shown} (of type {type(image).__name__}) is not an image; {_advice(image)}")


def is_encoded(image: object) -> bool:
    """Return whether an object is an image encoded by a model: it has a size, and no type that `to_rgb` accepts."""
    if isinstance(image, (np.ndarray, Image.Image)) or hasattr(image, "read") or hasattr(image, "numpy"):
        return False
    size = getattr(image, "size", None)
    return isinstance(size, tuple) and len(size) == 2


def _array_to_rgb(array: npt.NDArray[Any], max_pixels: int) -> npt.NDArray[np.uint8]:
    name = f"the array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim == 1 and array.dtype == np.uint8:
        raise ImageError(f"{name} has no height and width; if it is an encoded file, pass array.tobytes()")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        raise ImageError(f"{name} has its channels first; pass array.transpose(1, 2, 0), in BGR order")
    if array.ndim == 4:
        raise ImageError(f"{name} is a batch; pass its frames as a list, list(array)")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} is not an image; expected [H, W], [H, W, 1], [H, W, 3] (BGR) or [H, W, 4] (BGRA)")
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    if array.ndim == 3 and array.shape[2] == 3 and array[..., ::-1].flags.c_contiguous:  # a reversed view of RGB pixels
        return _to_uint8(array[..., ::-1].copy(), name)
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
    raise ImageError(f"{name} has an unsupported dtype; convert it to uint8 (0 to 255) first")


def _finite_range(values: npt.NDArray[Any], name: str) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ImageError(f"{name} must have finite values, got NaN or infinity")
    return low, high


def _pil_to_rgb(image: Image.Image, max_pixels: int) -> npt.NDArray[np.uint8]:
    name = f"the PIL image {_shown(image)}"
    _check_size(*image.size, name, max_pixels)
    try:
        image.load()  # Image.open does not decode
        return _pixels(image, name)
    except ImageError:
        raise
    except Exception as error:  # as in _decode
        raise ImageError(f"{name} cannot be read: {_reason(error)}") from error


def _pixels(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    """Return the pixels of a decoded PIL image as [H, W, 3] RGB, without rotation."""
    mode = image.mode
    if mode.startswith("I;16"):
        return np.repeat(_to_uint8(np.asarray(image)[..., None], name), 3, axis=2)
    if mode in ("I", "F"):
        return np.repeat(_rangeless_to_uint8(np.asarray(image)[..., None], name), 3, axis=2)
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # a direct conversion to RGB warns about the dropped transparency
    elif mode == "La":
        image = image.convert("LA")  # the only mode without a direct conversion
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), order="C")


def _rangeless_to_uint8(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """Scale an image of Pillow's modes I and F, whose value range must be inferred.

    The range is 0 to 255 after Pillow's `convert`, 0 to 1 in mode F, or 16 bits in mode I (PGM; PNG in older Pillow).
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
        image: Path, URL or bytes of an image file. Only the syntax of a URL is checked.
        max_pixels: Maximum width times height.

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
        ImageError: The file does not exist, or cannot be opened or read.
    """
    name = _shown_path(path)
    if path.startswith("data:") or len(path) > _LONGEST_PATH:
        raise ImageError(f"{name} is not a path; for an image in base64, pass base64.b64decode(text)")
    try:
        file = Path(path).expanduser()
        if not path or not file.exists():
            raise ImageError(f"{name}: no such image file")
        if file.is_dir():
            raise ImageError(f"{name} is a folder; pass the images in it one by one")
        if not file.is_file():  # opening a pipe or a device could block forever
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
    path = getattr(file, "name", None)  # a string for a file, a number for a pipe
    name = f"the file object of {_shown_path(path)}" if isinstance(path, str) else "the file object"
    try:
        encoded: object = file.read()
    except Exception as error:  # file-like objects may raise any exception
        raise ImageError(f"{name} cannot be read: {_reason(error)}") from error
    if not isinstance(encoded, (bytes, bytearray, memoryview)):
        raise ImageError(f"{name} must return bytes, got {type(encoded).__name__}; open it in binary mode, 'rb'")
    if not encoded:
        raise ImageError(f"{name} is empty or has been read already; call seek(0) to read it again")
    return _decode(io.BytesIO(encoded), f"{name}, {len(encoded)} bytes,", max_pixels)


def _decode(file: IO[bytes], name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    with _opened_nonempty(file, name, max_pixels) as image:
        return _pixels(upright_image(image, name, max_pixels), name)


@contextlib.contextmanager
def _opened_nonempty(file: IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    if not file.read(1):
        raise ImageError(f"{name} is empty (0 bytes)")
    with opened_image(file, name, max_pixels) as image:
        yield image


@contextlib.contextmanager
def opened_image(file: IO[bytes], name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file in one of `FORMATS` for the length of a `with`, without decoding it.

    Args:
        file: File object in binary mode.
        name: Name of the file in error messages.
        max_pixels: Maximum width times height.

    Raises:
        ImageError: The file is not an image, needs a decoder that is not installed, or is too large; or decoding it in
            the `with` fails.
    """
    with decoding_errors(name):
        for width, height in _declared_sizes(file):
            _check_size(width, height, name, max_pixels)
        file.seek(0)
        try:
            image = open_image(file)
        except UnidentifiedImageError as error:
            missing = _missing_decoder(file)
            if missing is None:
                raise
            raise ImageError(f"{name} {missing}, or convert it to PNG") from error
        with image:
            yield image


def upright_image(image: Image.Image, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode the current frame of an opened image file, and return it upright.

    Args:
        image: Image from `opened_image`, at any frame.
        name: Name of the file in error messages.
        max_pixels: Maximum width times height, checked before decoding.

    Raises:
        ImageError: The frame has no pixels or too many. Pillow's own errors are not converted, see `decoding_errors`.
    """
    _check_size(*image.size, name, max_pixels)
    for width, height in _tile_sizes(image):
        _check_size(width, height, name, max_pixels)
    image.load()
    orientation = _orientation(image)  # after load, because Pillow rotates TIFF files itself
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


@contextlib.contextmanager
def decoding_errors(name: str) -> Iterator[None]:
    """Convert the errors that Pillow raises for a file in the `with` to an `ImageError` with the name of the file."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(readable_formats())
        raise ImageError(f"{name} is not an image in a supported format ({known}); convert it to PNG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large: {error}; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # for damaged data, Pillow raises OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"{name} is truncated or damaged: {_reason(error)}") from error


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image file in one of `FORMATS` with Pillow, without decoding it.

    All image files are opened by this function, so that no other decoder is used.

    Args:
        file: File object in binary mode, at its start.

    Raises:
        UnidentifiedImageError: The format is not one of `FORMATS`.
    """
    return Image.open(file, formats=readable_formats())


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Return the `FORMATS` that this installation can decode."""
    Image.init()
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _missing_decoder(file: IO[bytes]) -> str | None:
    """Return the message for a file whose decoder is not installed; None for other files."""
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
    """Yield the (width, height) of images inside a file that `Image.open` decodes or whose size it does not return."""
    content.seek(0)
    start = content.read(12)
    with contextlib.suppress(struct.error):  # the decoder reports truncated files
        if start.startswith(_ICON_SIGNATURE):
            yield from _icon_sizes(content)
        elif start.startswith(_J2K_START) or start == _JP2_SIGNATURE:
            yield from _codestream_sizes(content)


def _icon_sizes(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the images of an icon from their headers; its directory has the sizes modulo 256."""
    file.seek(4)
    (count,) = struct.unpack("<H", file.read(2))
    entries = [struct.unpack("<12xI", file.read(16)) for _ in range(count)]
    for (offset,) in entries:
        file.seek(offset)
        header = file.read(24)  # header of a PNG, or of a bitmap without file header
        if header.startswith(_PNG_SIGNATURE):
            if header[12:16] != b"IHDR":
                raise UnidentifiedImageError
            width, height = struct.unpack(">16xII", header)
            yield width, height
        else:
            width, height = struct.unpack("<4xii12x", header)
            yield abs(width), abs(height) // 2  # a mask of the same size follows the pixels


def _codestream_sizes(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the codestreams of a JPEG 2000 file; the boxes of the file may have another size."""
    file.seek(0)
    content = file.read()
    start = content.find(_J2K_START)
    while start >= 0:
        header = content[start + 8 : start + 24]
        if len(header) == 16:
            right, bottom, left, top = struct.unpack(">IIII", header)
            yield max(1, right - left), max(1, bottom - top)
        start = content.find(_J2K_START, start + 4)


def _tile_sizes(image: Image.Image) -> Iterator[tuple[int, int]]:
    """Yield the tile size of a TIFF: a whole tile is allocated, even if it is larger than the image."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    width, height = tags.get(322), tags.get(323)  # TileWidth, TileLength
    if isinstance(width, int) and isinstance(height, int):
        yield max(1, width), max(1, height)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data; viewers show such images without rotation
        return 1


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: it is {width} wide and {height} high")
    if width * height > max_pixels:
        raise ImageError(f"{name} is too large: {width}x{height} pixels, the limit is {max_pixels:,}; shrink it first")


def _advice(image: object) -> str:
    if hasattr(image, "numpy"):  # tensors
        return "pass tensor.numpy() from the CPU, as [H, W, 3] uint8 in BGR order"
    if isinstance(image, (list, tuple)):
        return "pass one image at a time"
    return "pass a BGR NumPy array, a PIL image, a path, a URL, the bytes of an image file or a binary file object"


def _shown_path(path: str) -> str:
    """Return a path in quotes for messages; unlike `repr`, it does not double backslashes."""
    text = escaped(path)
    return f"'{text}'" if len(text) <= 300 else f"'{text[:280]}...' ({len(text)} characters)"


def _shown(value: object) -> str:
    """Return the shortened repr of a value for messages."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(
        error
    )  # without the path, which the message already has
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
