//! How people write sizes, times and modes, how they are written back to them, and how far one word is from another. Pure.

use std::time::Duration;

use crate::error::{Code, Error, Result};
use crate::telemetry::civil_date;

/// `8GiB`, `8G` (the same), `8GB` (10^9), `512MiB`, `1.5GiB` or plain bytes.
pub fn parse_size(text: &str) -> Result<u64> {
    let wrong = || Error::new(Code::Usage, format!("`{text}` is not a size; write 8GiB, 8G, 8GB, 512MiB or bytes"));
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    scaled(number, factor).ok_or_else(wrong)
}

/// `90d`, `12h`, `30m`, `30s`, `500ms`. A bare number is refused: nobody knows its unit.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let wrong = || Error::new(Code::Usage, format!("`{text}` is not a duration; write 90d, 12h, 30m, 30s or 500ms"));
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 7 * 86_400_000,
        _ => return Err(wrong()),
    };
    scaled(number, factor).map(Duration::from_millis).ok_or_else(wrong)
}

/// `number` (digits, at most one point, at most nine decimals) times `factor`, exact and checked.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || decimals.len() > 9 || (number.contains('.') && decimals.is_empty()) {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    let part = match decimals {
        "" => 0,
        digits => {
            let numerator = u128::from(digits.parse::<u64>().ok()?) * u128::from(factor);
            u64::try_from(numerator / 10u128.pow(u32::try_from(digits.len()).ok()?)).ok()?
        }
    };
    whole.checked_add(part)
}

/// Octal, as in `umask=0227`.
pub fn parse_octal(text: &str) -> Result<u32> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(Error::new(Code::Usage, format!("`{text}` is not an octal mode between 0 and 0777"))),
    }
}

/// Four figures are enough for people; `--json` has the bytes.
pub fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value >= 100.0 => format!("{value:.0} {}", UNITS[unit]),
        _ if value >= 10.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.2} {}", UNITS[unit]),
    }
}

/// Bytes a second, as disks and links are sold: powers of ten.
pub fn show_rate(bytes: u64, time: Duration) -> String {
    let rate = bytes as f64 / time.as_secs_f64().max(1e-9);
    match rate {
        r if r >= 1e9 => format!("{:.2} GB/s", r / 1e9),
        r if r >= 1e6 => format!("{:.0} MB/s", r / 1e6),
        r => format!("{:.0} kB/s", r / 1e3),
    }
}

/// A moment as UTC, to the second: `2026-11-22 02:18:00Z`.
pub fn show_time(unix_seconds: i64) -> String {
    let days = unix_seconds.div_euclid(86_400);
    let rest = unix_seconds.rem_euclid(86_400);
    let (year, month, day) = civil_date(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

/// Edits between two words (Levenshtein). Both are short; the typed one is cut.
pub fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, cb) in b.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, ca) in a.iter().enumerate() {
            let best = (diagonal + usize::from(*ca != cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = best;
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("8GiB", 8 << 30),
            ("8G", 8 << 30),
            ("8g", 8 << 30),
            ("8GB", 8_000_000_000),
            ("512MiB", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("4096", 4096),
            ("0", 0),
        ];
        for (text, wanted) in cases {
            assert_eq!(parse_size(text).expect(text), wanted, "{text}");
        }
        for text in ["", "G", "8 G", "8Gx", "-1", "1.", ".5G", "1.2.3G", "99999999999T", "0x10", "1e9"] {
            let err = parse_size(text).expect_err(text);
            assert_eq!(err.code(), Code::Usage);
            assert!(err.chain().contains("8GiB"), "the fix is named: {err:?}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("90d").expect("days").as_secs(), 90 * 86_400);
        assert_eq!(parse_duration("12h").expect("hours").as_secs(), 43_200);
        assert_eq!(parse_duration("1.5s").expect("half").as_millis(), 1_500);
        assert_eq!(parse_duration("500ms").expect("ms").as_millis(), 500);
        for text in ["30", "", "d", "1y", "-1s", "99999999999999999d"] {
            assert_eq!(parse_duration(text).expect_err(text).code(), Code::Usage);
        }
    }

    #[test]
    fn a_moment_is_shown_in_utc() {
        assert_eq!(show_time(0), "1970-01-01 00:00:00Z");
        assert_eq!(show_time(1_790_000_000), "2026-09-21 14:13:20Z");
        assert_eq!(show_time(951_782_400), "2000-02-29 00:00:00Z");
        assert_eq!(show_time(-1), "1969-12-31 23:59:59Z");
    }

    #[test]
    fn sizes_are_shown_in_few_figures() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(1536), "1.50 KiB");
        assert_eq!(show_size(64 << 20), "64.0 MiB");
        assert_eq!(show_rate(2_000_000_000, Duration::from_secs(1)), "2.00 GB/s");
    }
}
