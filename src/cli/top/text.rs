//! A frame as lines of text, with or without colours.
//!
//! Promises: a line is no wider than the frame and ends without blanks; without colours there is no escape sequence.

use ratatui::buffer::{Buffer, Cell};
use ratatui::style::{Color, Modifier, Style};

/// The lines of a frame, each ended.
pub fn lines(buffer: &Buffer, color: bool) -> String {
    let mut text = String::new();
    for row in buffer.content.chunks(usize::from(buffer.area.width).max(1)) {
        text.push_str(&line(row, color));
        text.push('\n');
    }
    text
}

fn line(row: &[Cell], color: bool) -> String {
    let plain = Style::reset();
    let is_blank = |cell: &Cell| cell.symbol() == " " && (!color || !shows_when_blank(&cell.style()));
    let len = row.iter().rposition(|cell| !is_blank(cell)).map_or(0, |last| last + 1);
    let mut text = String::new();
    let mut style = codes(&plain);
    let mut covered = 0;
    for cell in &row[..len] {
        // A wide character stands in its first cell; those it covers are blank.
        if covered > 0 {
            covered -= 1;
            continue;
        }
        covered = ratatui::text::Span::raw(cell.symbol()).width().saturating_sub(1);
        if color {
            let wanted = codes(&cell.style());
            if wanted != style {
                text.push_str(&format!("\u{1b}[0{wanted}m"));
                style = wanted;
            }
        }
        text.push_str(cell.symbol());
    }
    if !style.is_empty() {
        text.push_str("\u{1b}[0m");
    }
    text
}

fn shows_when_blank(style: &Style) -> bool {
    style.add_modifier.contains(Modifier::REVERSED) || !matches!(style.bg, None | Some(Color::Reset))
}

/// The parameters of SGR after a reset.
fn codes(style: &Style) -> String {
    let mut codes = String::new();
    for (modifier, code) in [(Modifier::BOLD, 1), (Modifier::DIM, 2), (Modifier::REVERSED, 7)] {
        if style.add_modifier.contains(modifier) {
            codes.push_str(&format!(";{code}"));
        }
    }
    for (color, base) in [(style.fg, 30), (style.bg, 40)] {
        if let Some(code) = color.and_then(code_of) {
            codes.push_str(&format!(";{}", base + code));
        }
    }
    codes
}

/// The sixteen that every terminal has, as their distance from 30.
fn code_of(color: Color) -> Option<u16> {
    match color {
        Color::Black => Some(0),
        Color::Red => Some(1),
        Color::Green => Some(2),
        Color::Yellow => Some(3),
        Color::Blue => Some(4),
        Color::Magenta => Some(5),
        Color::Cyan => Some(6),
        Color::Gray => Some(7),
        Color::DarkGray => Some(60),
        Color::LightRed => Some(61),
        Color::LightGreen => Some(62),
        Color::LightYellow => Some(63),
        Color::LightBlue => Some(64),
        Color::LightMagenta => Some(65),
        Color::LightCyan => Some(66),
        Color::White => Some(67),
        // Never drawn with: no palette of 256 is asked for.
        Color::Reset | Color::Indexed(_) | Color::Rgb(..) => None,
    }
}

#[cfg(test)]
mod tests {
    use ratatui::layout::Rect;

    use super::*;

    #[test]
    fn colours_are_written_where_they_change_and_only_when_asked_for() {
        let mut buffer = Buffer::empty(Rect::new(0, 0, 8, 2));
        buffer.set_string(0, 0, "ab", Style::new().fg(Color::Green).add_modifier(Modifier::BOLD));
        buffer.set_string(2, 0, "c", Style::new());
        buffer.set_string(0, 1, "d ", Style::new().add_modifier(Modifier::REVERSED));
        assert_eq!(lines(&buffer, false), "abc\nd\n");
        assert_eq!(lines(&buffer, true), "\u{1b}[0;1;32mab\u{1b}[0mc\n\u{1b}[0;7md \u{1b}[0m\n");
    }

    #[test]
    fn a_wide_character_takes_its_two_cells_once() {
        let mut buffer = Buffer::empty(Rect::new(0, 0, 6, 1));
        buffer.set_string(0, 0, "模b", Style::new());
        assert_eq!(lines(&buffer, false), "模b\n");
    }
}
