//! A frame: two samples and a choice, drawn into cells.
//!
//! In: a [`View`]. Out: the cells of a buffer, and before that how much there is room for ([`Room`]), so that no more is
//! asked of the mount. Promises: pure; any size is drawn, also one column of one line; without colours every state still has
//! a sign of its own; names are shown without control characters.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::sample::{Choice, Maps, ModelRow, Rates, Sample};
use crate::cache::Part;
use crate::cli::out::printable;
use crate::control::FileRow;
use crate::units::{show_rate, show_size};

/// Lines about the mount as a whole.
const HEAD_LINES: u16 = 8;
/// The legend and the keys.
const FOOT_LINES: u16 = 2;
/// A cell of the map is drawn this wide at most, where there are few.
const TILE_MAX: usize = 8;

/// With what is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub color: bool,
    pub ascii: bool,
}

/// All that a frame shows.
pub struct View<'a> {
    pub before: &'a Sample,
    pub now: &'a Sample,
    pub maps: &'a Maps,
    pub choice: &'a Choice,
    /// How many mounts one can go through.
    pub mounts: usize,
    pub look: Look,
    pub note: Option<&'a str>,
}

/// How many rows and cells a frame of a size has for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub models: usize,
    pub files: usize,
    /// Cells beside a file's name.
    pub file_cells: usize,
    pub map_lines: usize,
    map_columns: usize,
    /// Cells of the large map.
    pub map_cells: usize,
}

impl Room {
    /// A quarter of the lines for models, the rest for files and the map of one; each has a line of titles.
    pub fn of(area: Rect, models: usize) -> Room {
        let rest = usize::from(area.height.saturating_sub(HEAD_LINES + FOOT_LINES));
        let columns = usize::from(area.width).saturating_sub(2);
        let models = models.min((rest / 4).max(1)).min(rest.saturating_sub(1));
        let rest = rest.saturating_sub(1 + models);
        let lines = rest.saturating_sub(2);
        let map_lines = lines * 2 / 5;
        Room {
            models,
            files: lines - map_lines,
            file_cells: columns / 3,
            map_lines,
            map_columns: columns,
            map_cells: map_lines * columns,
        }
    }

    /// The same once it is known how many files there are: lines that they do not need are the map's.
    pub fn given(self, files: usize) -> Room {
        let files = self.files.min(files);
        let map_lines = self.map_lines + (self.files - files);
        Room { files, map_lines, map_cells: map_lines * self.map_columns, ..self }
    }

    /// For `--json`: as much as is told at once of the first files.
    pub fn ample() -> Room {
        Room { models: 0, files: 256, file_cells: 128, map_lines: 64, map_columns: 64, map_cells: 4096 }
    }
}

/// Draws the frame.
pub fn paint(view: &View<'_>, area: Rect, buffer: &mut Buffer) {
    let area = area.intersection(buffer.area);
    let models = view.now.models();
    let room = Room::of(area, models.len()).given(view.maps.list.files);
    let mut page = Page { buffer, area, look: view.look, line: 0 };
    head(view, &mut page);
    page.line = page.line.max(HEAD_LINES);
    model_rows(view, &room, &mut page);
    file_rows(view, &room, &mut page);
    map(view, &room, &mut page);
    page.line = area.height.saturating_sub(FOOT_LINES).max(page.line);
    legend(&mut page);
    let keys = "q ends  up/down file  tab model  space stops";
    let more = if view.mounts > 1 { format!("{keys}  m next mount ({} of them)", view.mounts) } else { keys.into() };
    page.put(Line::styled(more, page.dim()));
}

/// Where the next line goes.
struct Page<'a> {
    buffer: &'a mut Buffer,
    area: Rect,
    look: Look,
    line: u16,
}

impl Page<'_> {
    fn columns(&self) -> usize {
        usize::from(self.area.width)
    }

    fn put(&mut self, line: Line<'_>) {
        if self.line < self.area.height {
            self.buffer.set_line(self.area.x, self.area.y + self.line, &line, self.area.width);
        }
        self.line = self.line.saturating_add(1);
    }

    fn style(&self, color: Color) -> Style {
        if self.look.color { Style::new().fg(color) } else { Style::new() }
    }

    fn dim(&self) -> Style {
        self.style(Color::DarkGray)
    }

    fn sign<'s>(&self, drawn: &'s str, ascii: &'s str) -> &'s str {
        if self.look.ascii { ascii } else { drawn }
    }

    /// A name as it may stand here.
    fn name(&self, text: &str) -> String {
        let text = printable(text);
        if self.look.ascii { text.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect() } else { text }
    }

    /// A line that divides, with a title at the left and titles of columns at the right.
    fn section(&mut self, title: &str, columns: &str) {
        let rule = self.sign("─", "-");
        let used = 4 + Span::raw(title).width() + Span::raw(columns).width();
        let fill = rule.repeat(self.columns().saturating_sub(used + 1));
        let spans = vec![
            Span::styled(format!("{rule}{rule} "), self.dim()),
            Span::styled(title.to_owned(), self.style(Color::Cyan).add_modifier(Modifier::BOLD)),
            Span::styled(format!(" {fill} "), self.dim()),
            Span::styled(columns.to_owned(), self.dim()),
        ];
        self.put(Line::from(spans));
    }

    /// A share of something as a bar of so many columns.
    fn bar(&self, share: f64, columns: usize, color: Color) -> Vec<Span<'static>> {
        let full = (share.clamp(0.0, 1.0) * columns as f64).round() as usize;
        let (on, off) = (self.sign("█", "#").repeat(full), self.sign("·", ".").repeat(columns - full));
        vec![Span::styled(on, self.style(color)), Span::styled(off, self.dim())]
    }

    fn part(&self, part: Part) -> (&'static str, Style) {
        let (drawn, ascii, color) = match part {
            Part::Refused => ("!", "!", Color::LightRed),
            Part::Awaited => ("▒", "w", Color::LightYellow),
            Part::Read => ("▓", "@", Color::LightCyan),
            Part::Coming => ("░", ">", Color::LightBlue),
            Part::Resident => ("█", "#", Color::Green),
            Part::Partly => ("▄", "+", Color::Green),
            Part::Absent => ("·", ".", Color::DarkGray),
        };
        (if self.look.ascii { ascii } else { drawn }, self.style(color))
    }
}

/// A label and what it tells, in columns.
fn entry<'a>(page: &Page<'_>, label: &'a str, tells: Vec<Span<'a>>) -> Line<'a> {
    let mut spans = vec![Span::styled(format!("{label:<8}"), page.style(Color::Cyan))];
    spans.extend(tells);
    Line::from(spans)
}

fn head(view: &View<'_>, page: &mut Page<'_>) {
    let now = view.now;
    let rates = Rates::between(view.before, now);
    title(view, page);

    let passthrough = if now.status["passthrough"] == true { "passthrough" } else { "no passthrough" };
    let place = [
        page.name(now.text("/store")),
        format!("verify {}", now.text("/verify")),
        format!("opens {}, {passthrough}", now.text("/open_policy")),
        page.name(now.text("/memory")),
    ];
    page.put(entry(page, "store", vec![Span::raw(place.join("   "))]));

    let (used, total) = (now.count("/cache/bytes"), now.count("/cache/bytes_max"));
    let mut cache = page.bar(fraction(used, total), (page.columns() / 3).min(40), Color::Green);
    cache.push(Span::raw(format!(
        "  {} of {}   {}   peak {}",
        show_size(used),
        show_size(total),
        percent(used, total),
        show_size(now.count("/cache/bytes_peak"))
    )));
    page.put(entry(page, "cache", cache));

    let bytes = |rate: f64| show_rate(rate as u64, std::time::Duration::from_secs(1));
    let mean = rates.fetch_seconds.map_or_else(|| "-".into(), |seconds| format!("{:.0} ms", seconds * 1000.0));
    page.put(entry(
        page,
        "fetch",
        vec![Span::raw(format!(
            "{:>10}   {:>8} requests   {mean:>8} each   evicted {}",
            bytes(rates.fetched_bytes),
            often(rates.fetches),
            bytes(rates.evicted_bytes)
        ))],
    ));

    let (hits, misses) = (now.metric("cache_hits"), now.metric("cache_misses"));
    let since_start = match hits + misses {
        0 => "-".into(),
        all => percent(hits, all),
    };
    let hit_rate = rates.hit_rate.map_or_else(|| "-".into(), |rate| format!("{:.1} %", rate * 100.0));
    page.put(entry(
        page,
        "read",
        vec![Span::raw(format!(
            "{:>10}   {:>8} reads      {hit_rate:>8} hits   {since_start} since the start   waits {}",
            bytes(rates.read_bytes),
            often(rates.reads),
            often(rates.waits)
        ))],
    ));

    page.put(entry(
        page,
        "opens",
        vec![Span::raw(format!(
            "passthrough {}   plain {}   held {}, {} in vain   open now {}",
            now.metric("opens_passthrough"),
            now.metric("opens_plain"),
            now.metric("opens_held"),
            now.metric("opens_held_in_vain"),
            now.count("/open_handles")
        ))],
    ));

    let keys = keepers(view, page);
    page.put(entry(page, "keys", keys));
    let seen = troubles(now, page);
    page.put(entry(page, "trouble", seen));
}

fn title(view: &View<'_>, page: &mut Page<'_>) {
    let now = view.now;
    let locked = now.models().iter().filter(|model| model.locked).count();
    let (state, color) = match (view.note, now.status["refused"] == true, locked) {
        (Some(note), ..) => (page.name(note), Color::LightYellow),
        (None, true, _) => ("refuses its readers".into(), Color::LightRed),
        (None, false, 0) => ("serving".into(), Color::LightGreen),
        (None, false, all) if all == now.models().len() => ("locked".into(), Color::LightRed),
        (None, false, some) => (format!("{some} of {} models locked", now.models().len()), Color::LightYellow),
    };
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let right = format!("pid {}, up {}", now.count("/pid"), lasting(now.count("/uptime_seconds")));
    let mountpoint = page.name(now.text("/mountpoint"));
    let used = Span::raw(format!("modelfs {mountpoint}  {state}{right}")).width();
    page.put(Line::from(vec![
        Span::styled("modelfs ", page.style(Color::Cyan).patch(bold)),
        Span::styled(mountpoint, bold),
        Span::styled(format!("  {state}"), page.style(color).patch(bold)),
        Span::raw(" ".repeat(page.columns().saturating_sub(used).max(1))),
        Span::styled(right, page.dim()),
    ]));
}

/// Who holds the keys, and the store's credentials.
fn keepers<'a>(view: &View<'_>, page: &Page<'_>) -> Vec<Span<'a>> {
    let now = view.now;
    let mut spans = Vec::new();
    match now.text("/vault/state") {
        "" => spans.push(Span::raw("no Vault")),
        state => {
            let color = match state {
                "live" | "idle" => Color::LightGreen,
                "away" => Color::LightYellow,
                _ => Color::LightRed,
            };
            spans.push(Span::raw("Vault "));
            spans.push(Span::styled(page.name(state), page.style(color)));
            let left = now.status.pointer("/vault/token_seconds_left").and_then(serde_json::Value::as_u64);
            if let Some(left) = left {
                spans.push(Span::raw(format!(", its token ends in {}", lasting(left))));
            }
            let why = now.text("/vault/why");
            if !why.is_empty() {
                spans.push(Span::styled(format!(": {}", page.name(why)), page.style(color)));
            }
        }
    }
    match now.text("/storage_credentials/state") {
        "" => {}
        state => {
            let color = if matches!(state, "current" | "idle") { Color::LightGreen } else { Color::LightRed };
            spans.push(Span::raw("   storage credentials "));
            spans.push(Span::styled(page.name(state), page.style(color)));
        }
    }
    spans
}

/// What should be zero, and is not.
fn troubles<'a>(now: &Sample, page: &Page<'_>) -> Vec<Span<'a>> {
    let tampered =
        [("hash_failures", "wrong hashes"), ("tag_failures", "wrong tags"), ("length_failures", "wrong lengths")];
    let others = [
        ("fetch_errors", "fetches failed"),
        ("read_errors", "reads failed"),
        ("deadline_errors", "deadlines missed"),
        ("credentials_failed", "credentials not given"),
        ("passthrough_refused", "passthrough refused"),
        ("audit_failures", "events not recorded"),
        ("alerts_failed", "alerts not delivered"),
        ("alerts_dropped", "alerts dropped"),
        ("blocked", "users blocked"),
    ];
    let mut spans = Vec::new();
    let all = tampered.map(|it| (it, Color::LightRed)).into_iter().chain(others.map(|it| (it, Color::LightYellow)));
    for ((name, words), color) in all {
        let count = now.metric(name);
        if count > 0 {
            spans.push(Span::styled(format!("{count} {words}   "), page.style(color)));
        }
    }
    let unwiped = now.metric("unwiped_bytes");
    if unwiped > 0 {
        spans.push(Span::styled(format!("{} not overwritten   ", show_size(unwiped)), page.style(Color::LightRed)));
    }
    if spans.is_empty() {
        spans.push(Span::styled("none seen", page.style(Color::LightGreen)));
    }
    spans
}

/// A page of so many rows, of which one is chosen: the number of its first.
fn page_start(chosen: usize, rows: usize) -> usize {
    chosen - chosen % rows.max(1)
}

fn mark(page: &Page<'_>, chosen: bool) -> (Span<'static>, Style) {
    let style = if chosen { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
    let sign = if chosen { page.sign("▸ ", "> ") } else { "  " };
    (Span::styled(sign.to_owned(), page.style(Color::LightCyan).patch(style)), style)
}

fn model_rows(view: &View<'_>, room: &Room, page: &mut Page<'_>) {
    let models = view.now.models();
    let bar = page.columns() / 5;
    let first = page_start(view.choice.model, room.models);
    let rows = models.iter().enumerate().skip(first).take(room.models);
    let titles = format!("{:>7} {:>9} {:<bar$} {:>6} {:<8}", "version", "size", " in memory", "", "state");
    page.section(&format!("models{}", counted(first, rows.len(), models.len())), &titles);
    for (number, model) in rows {
        let (sign, style) = mark(page, number == view.choice.model);
        let width = page.columns().saturating_sub(36 + bar);
        let share = fraction(model.resident_bytes, model.bytes);
        let mut spans = vec![sign, Span::styled(fit(page, &model.name, width), style)];
        spans.push(Span::raw(format!(" {:>7} {:>9} ", model.version, show_size(model.bytes))));
        spans.extend(page.bar(share, bar, Color::Green));
        spans.push(Span::raw(format!(" {:>6} ", percent(model.resident_bytes, model.bytes))));
        spans.push(state_of(model, page));
        page.put(Line::from(spans));
    }
}

fn state_of(model: &ModelRow, page: &Page<'_>) -> Span<'static> {
    match (model.locked, model.current) {
        (true, _) => Span::styled("locked", page.style(Color::LightRed)),
        (false, true) => Span::styled("current", page.style(Color::LightGreen)),
        (false, false) => Span::styled("older", page.dim()),
    }
}

fn file_rows(view: &View<'_>, room: &Room, page: &mut Page<'_>) {
    let list = &view.maps.list;
    let cells = room.file_cells;
    let titles = format!("{:>9} {:>9} {:>6} {:<cells$}", "size", "in memory", "bypass", "map");
    let model = page.name(&format!("{}@{}", list.model, list.version));
    page.section(&format!("files of {model}{}", counted(list.from, list.rows.len(), list.files)), &titles);
    for (at, row) in list.rows.iter().take(room.files).enumerate() {
        let (sign, style) = mark(page, list.from + at == view.choice.file);
        let width = page.columns().saturating_sub(30 + cells);
        let mut spans = vec![sign, Span::styled(fit(page, &row.path, width), style)];
        spans.push(Span::raw(format!(
            " {:>9} {:>9} {:>6} ",
            show_size(row.bytes),
            percent(row.resident_bytes, row.bytes),
            if row.passthrough_opens > 0 { row.passthrough_opens.to_string() } else { "-".into() }
        )));
        let parts = parts(row);
        // Every map has the whole width: shares of small and large files can be compared.
        spans.extend(runs(page, (0..cells).filter_map(|at| parts.get(at * parts.len() / cells).copied()), 1));
        page.put(Line::from(spans));
    }
}

fn map(view: &View<'_>, room: &Room, page: &mut Page<'_>) {
    if room.map_lines == 0 {
        return;
    }
    let Some(row) = &view.maps.chosen else { return };
    let scale = match row.cell_chunks {
        1 => "each cell a chunk".to_owned(),
        more => format!("each cell {more} chunks"),
    };
    let told = format!("{} of {}, {} chunks, {scale}", show_size(row.resident_bytes), show_size(row.bytes), row.chunks);
    let width = page.columns().saturating_sub(Span::raw(&told).width() + 18);
    let title = fit(page, &row.path, width);
    page.section(&format!("map of {}", title.trim_end()), &told);
    let parts = parts(row);
    let columns = room.map_columns.max(1);
    let lines_of = |tile: usize| parts.len().div_ceil((columns / tile).max(1));
    let tile = (1..=TILE_MAX).rev().find(|tile| lines_of(*tile) <= room.map_lines).unwrap_or(1);
    for line in parts.chunks((columns / tile).max(1)).take(room.map_lines) {
        let mut spans = vec![Span::raw(" ")];
        spans.extend(runs(page, line.iter().copied(), tile));
        page.put(Line::from(spans));
    }
}

fn legend(page: &mut Page<'_>) {
    let words = [
        (Part::Resident, "in memory"),
        (Part::Read, "read just now"),
        (Part::Awaited, "awaited"),
        (Part::Coming, "on its way"),
        (Part::Partly, "partly"),
        (Part::Absent, "absent"),
        (Part::Refused, "refused"),
    ];
    let mut spans = Vec::new();
    for (part, words) in words {
        let (sign, style) = page.part(part);
        spans.push(Span::styled(sign, style));
        spans.push(Span::styled(format!(" {words}  "), page.dim()));
    }
    page.put(Line::from(spans));
}

fn parts(row: &FileRow) -> Vec<Part> {
    // A letter of a later version is shown as nothing rather than as something wrong.
    row.cells.chars().map(|letter| Part::of_letter(letter).unwrap_or(Part::Absent)).collect()
}

/// Cells side by side, each `tile` wide with a gap when there is room for one; equal ones in one span.
fn runs(page: &Page<'_>, parts: impl Iterator<Item = Part>, tile: usize) -> Vec<Span<'static>> {
    let mut spans: Vec<Span<'static>> = Vec::new();
    let mut last = None;
    for part in parts {
        let (sign, style) = page.part(part);
        let drawn = match tile {
            1 | 2 => sign.repeat(tile),
            wide => format!("{} ", sign.repeat(wide - 1)),
        };
        match spans.last_mut() {
            Some(span) if last == Some(part) => span.content.to_mut().push_str(&drawn),
            _ => spans.push(Span::styled(drawn, style)),
        }
        last = Some(part);
    }
    spans
}

/// `, 11 to 20 of 34` unless all are shown.
fn counted(first: usize, shown: usize, all: usize) -> String {
    if shown >= all { format!(" ({all})") } else { format!(", {} to {} of {all}", first + 1, first + shown) }
}

/// Exactly so many columns wide: filled up with blanks, or cut at the front, since the ends of names tell them apart.
fn fit(page: &Page<'_>, text: &str, width: usize) -> String {
    let text = page.name(text);
    let wide = |text: &str| Span::raw(text).width();
    let mut shown = text.clone();
    if wide(&text) > width {
        let mark = page.sign("…", "~");
        let mut rest = text.chars();
        while wide(rest.as_str()) + 1 > width && rest.next().is_some() {}
        shown = if width == 0 { String::new() } else { format!("{mark}{}", rest.as_str()) };
    }
    let blanks = width.saturating_sub(wide(&shown));
    shown + &" ".repeat(blanks)
}

fn fraction(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Rounded down, so that only all of it is 100 %, and a little of it is not nothing.
fn percent(part: u64, whole: u64) -> String {
    match (part, whole) {
        (_, 0) => "-".into(),
        (0, _) => "0 %".into(),
        (part, whole) => match u128::from(part) * 100 / u128::from(whole) {
            0 => "<1 %".into(),
            some => format!("{some} %"),
        },
    }
}

fn often(rate: f64) -> String {
    if rate >= 100.0 { format!("{rate:.0}/s") } else { format!("{rate:.1}/s") }
}

fn lasting(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::{Value, json};

    use super::*;
    use crate::control::FileMap;

    fn status() -> Value {
        json!({
            "mountpoint": "/mnt/models", "store": "s3://models/prod", "pid": 4242, "uptime_seconds": 7980,
            "verify": "strict", "open_policy": "auto", "passthrough": true, "refused": false, "memory": "tmpfs",
            "open_handles": 3,
            "vault": {"address": "https://vault:8200", "auth": "approle", "state": "live", "token_seconds_left": 2811},
            "cache": {"bytes": 3u64 << 30, "bytes_max": 4u64 << 30, "bytes_peak": 4u64 << 30},
            "metrics": {"cache_hits": 90, "cache_misses": 10, "opens_passthrough": 12, "opens_plain": 3},
            "models": [
                {"name": "acme/llama", "version": 3, "current": true, "files": 2, "bytes": 1000, "locked": false,
                 "resident_bytes": 500},
                {"name": "acme/other", "version": 1, "current": true, "files": 1, "bytes": 10, "locked": true,
                 "resident_bytes": 0},
            ],
        })
    }

    fn row(path: &str, cells: &str) -> FileRow {
        FileRow {
            path: path.into(),
            bytes: 1000,
            resident_bytes: 500,
            chunks: cells.len() as u64,
            cell_chunks: 1,
            cells: cells.into(),
            passthrough_opens: 0,
        }
    }

    fn maps(cells: &str) -> Maps {
        let rows = vec![row("config.json", "#"), row("model.safetensors", cells)];
        let chosen = rows.last().cloned();
        Maps { list: FileMap { model: "acme/llama".into(), version: 3, files: 2, from: 0, rows }, chosen }
    }

    fn samples(before: Value, now: Value) -> (Sample, Sample) {
        let then = Instant::now();
        let sample = |status, at| Sample::of(status, at).expect("a status");
        (sample(before, then), sample(now, then + Duration::from_secs(2)))
    }

    fn drawn(size: (u16, u16), look: Look, note: Option<&str>, now: Value, maps: &Maps) -> String {
        let (before, now) = samples(status(), now);
        let choice = Choice { mount: 0, model: 0, file: 1 };
        let view = View { before: &before, now: &now, maps, choice: &choice, mounts: 2, look, note };
        let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).expect("memory");
        terminal.draw(|frame| paint(&view, frame.area(), frame.buffer_mut())).expect("memory");
        super::super::text::lines(terminal.backend().buffer(), look.color)
    }

    const PLAIN: Look = Look { color: false, ascii: false };
    const ASCII: Look = Look { color: false, ascii: true };

    #[test]
    fn a_frame_shows_the_mount_its_rates_and_what_is_in_memory() {
        let mut now = status();
        now["metrics"]["fetch_bytes"] = json!(400_000_000u64);
        now["metrics"]["fetch_requests"] = json!(20);
        now["metrics"]["fetch_seconds"] = json!(3.0);
        now["metrics"]["cache_hits"] = json!(120);
        now["metrics"]["cache_misses"] = json!(20);
        let text = drawn((100, 30), PLAIN, None, now, &maps("##>w@.!+"));
        for part in [
            "modelfs /mnt/models  1 of 2 models locked",
            "pid 4242, up 2 h 13 min",
            "s3://models/prod   verify strict   opens auto, passthrough",
            "3.00 GiB of 4.00 GiB   75 %",
            "200 MB/s     10.0/s requests     150 ms each",
            "75.0 % hits   85 % since the start   waits 5.0/s",
            "passthrough 12   plain 3",
            "Vault live, its token ends in 46 min",
            "trouble none seen",
            "▸ acme/llama",
            " 50 % current",
            "0 % locked",
            "files of acme/llama@3 (2)",
            "▸ model.safetensors",
            "map of model.safetensors",
            "8 chunks, each cell a chunk",
            "m next mount (2 of them)",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
        // Tiles as wide as there is room: all eight states, in their order.
        let tiles: Vec<String> = "██░▒▓·!▄".chars().map(|sign| sign.to_string().repeat(7)).collect();
        assert!(text.contains(&tiles.join(" ")), "{text}");
    }

    #[test]
    fn every_state_of_a_cell_has_a_sign_of_its_own_without_colours() {
        for look in [PLAIN, ASCII] {
            let mut buffer = Buffer::empty(Rect::new(0, 0, 1, 1));
            let page = Page { area: buffer.area, buffer: &mut buffer, look, line: 0 };
            let mut signs: Vec<&str> = Part::ALL.into_iter().map(|part| page.part(part).0).collect();
            signs.sort_unstable();
            signs.dedup();
            assert_eq!(signs.len(), Part::ALL.len());
            assert_eq!(look.ascii, signs.iter().all(|sign| sign.is_ascii()));
        }
        for part in Part::ALL {
            assert_eq!(Part::of_letter(part.letter()), Some(part));
        }
    }

    #[test]
    fn a_dumb_terminal_gets_ascii_and_a_colourless_one_no_escapes() {
        let text = drawn((100, 30), ASCII, None, status(), &maps("##>w@.!+"));
        assert!(text.is_ascii(), "{text}");
        assert!(!text.contains('\u{1b}'));
        assert!(
            drawn((100, 30), Look { color: true, ascii: false }, None, status(), &maps("#")).contains("\u{1b}[0;32m")
        );
    }

    #[test]
    fn any_size_is_drawn_and_no_line_is_wider_than_the_frame() {
        let long = maps(&"#.".repeat(5000));
        for columns in [1, 2, 3, 10, 37, 79, 80, 200] {
            for lines in [1, 2, 8, 9, 10, 11, 12, 15, 24, 100] {
                for maps in [&long, &maps("#"), &Maps::default()] {
                    let text = drawn((columns, lines), PLAIN, Some("a note"), status(), maps);
                    assert_eq!(text.lines().count(), usize::from(lines));
                    let widest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
                    assert!(widest <= usize::from(columns), "{widest} of {columns}:\n{text}");
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_stands_on_the_first_screen() {
        let mut now = status();
        now["metrics"]["hash_failures"] = json!(2);
        now["metrics"]["unwiped_bytes"] = json!(4096);
        now["vault"] = json!({"state": "lost", "why": "permission denied\u{1b}[2J"});
        now["models"][0]["locked"] = json!(true);
        let text = drawn((80, 24), PLAIN, None, now, &maps("!"));
        for part in ["2 wrong hashes", "4.00 KiB not overwritten", "Vault lost: permission denied", "locked"] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
        assert!(!text.contains('\u{1b}'), "a name wrote an escape sequence");
        let silent = drawn((80, 24), PLAIN, Some("no answer for 7 s"), status(), &Maps::default());
        assert!(silent.contains("no answer for 7 s") && !silent.contains("serving"), "{silent}");
    }

    #[test]
    fn no_more_is_asked_for_than_there_is_room_to_show() {
        for columns in [0, 1, 40, 100, 1000] {
            for lines in [0, 1, 9, 12, 24, 60, 1000] {
                for models in [0, 1, 5, 10_000] {
                    let room = Room::of(Rect::new(0, 0, columns, lines), models);
                    for files in [0, 1, 7, 100_000] {
                        let given = room.given(files);
                        let used = given.models + given.files + given.map_lines;
                        assert!(used <= usize::from(lines), "{given:?} in {lines} lines");
                        assert!(given.file_cells <= usize::from(columns));
                        assert_eq!(given.map_cells, given.map_lines * usize::from(columns).saturating_sub(2));
                    }
                }
            }
        }
    }

    #[test]
    fn shares_are_rounded_so_that_all_and_nothing_are_only_themselves() {
        assert_eq!(percent(999, 1000), "99 %");
        assert_eq!(percent(1000, 1000), "100 %");
        assert_eq!(percent(1, 1000), "<1 %");
        assert_eq!(percent(0, 1000), "0 %");
        assert_eq!(percent(0, 0), "-");
    }
}
