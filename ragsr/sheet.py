"""Contact sheets: pictures side by side with captions, on white."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Cell = tuple[Image.Image, str]  # a picture and its caption, which may have several lines
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def contact_sheet(rows: Sequence[Sequence[Cell]], height: int = 320, margin: int = 16) -> Image.Image:
    """A sheet of pictures, row under row: every picture `height` pixels high, its caption below it.

    Captions are wrapped to the width of their picture.
    """
    font = ImageFont.load_default(size=max(10, height // 20))
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow gives its scalable font to whom names a size
    strips = [_row([_cell(picture, caption, height, font) for picture, caption in row], margin) for row in rows]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips) + margin), WHITE)
    top = margin
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _row(cells: Sequence[Image.Image], margin: int) -> Image.Image:
    width = sum(cell.width + margin for cell in cells) + margin
    strip = Image.new("RGB", (width, max(cell.height for cell in cells) + margin), WHITE)
    left = margin
    for cell in cells:
        strip.paste(cell, (left, 0))
        left += cell.width + margin
    return strip


def _cell(picture: Image.Image, caption: str, height: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One picture above its caption, at least as wide as it is high divided by two, so that a caption fits."""
    width = max(1, round(picture.width * height / picture.height))
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    box = max(width, height // 2)
    lines = "\n".join(_wrap(line, box, font) for line in caption.splitlines())
    gap, line_height = height // 40, int(font.size * 1.4)
    cell = Image.new("RGB", (box, height + gap + line_height * (lines.count("\n") + 1)), WHITE)
    cell.paste(scaled, (0, 0))
    ImageDraw.Draw(cell).multiline_text((0, height + gap), lines, BLACK, font, spacing=font.size * 0.4)
    return cell


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break lines between words where they fit, inside a word where it is too long by itself."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)
