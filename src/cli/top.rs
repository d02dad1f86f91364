//! `modelfs top`: a mount as people look at it, again and again.
//!
//! In: what the control socket answers to `status` and `map`. Out: frames on a terminal; one frame as text; one sample as
//! JSON.
//! Promises: looking changes nothing of the mount; the terminal is as it was before, however this ends; what a store or a
//! publisher called a file cannot write escape sequences.
//! `sample`: what was asked and what it means per second. `paint`: a frame, a pure function of two samples. `text`: a frame
//! as lines.
//! Held by: the tests in `paint` and `text`, tests/top.rs.

mod paint;
mod sample;
mod text;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;

use self::paint::{Look, Room, View};
use self::sample::{Choice, Maps, Mount, Rates, Sample};
use super::Out;
use crate::error::{Code, Error, Result};
use crate::units::parse_duration;
use crate::{host, refuse};

/// Nobody reads faster, and every frame asks the mount three times.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// How soon a signal to stop is seen.
const SIGNAL_POLL: Duration = Duration::from_millis(100);
/// Of a frame that goes nowhere with a size.
const SIZE: (u16, u16) = (100, 40);
/// More would be a mistake, and 4 bytes a cell of memory.
const SIDE_MAX: u16 = 1000;

/// Watch a mount: its models, what of them is in memory, how fast they are fetched and read, and a map of each file.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TopArgs {
    /// Where it is mounted [default: the mounts of this user, one at a time]
    mountpoint: Option<PathBuf>,
    /// How often to look, as in 500ms
    #[arg(long, value_name = "TIME", default_value = "1s")]
    every: String,
    /// Print one frame as text and end; so does standard output that is no terminal
    #[arg(long)]
    once: bool,
    /// The model of the map: NAME, or NAME@NUMBER [default: the first]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The file of the map, by its path in the model [default: the first]
    #[arg(long, value_name = "PATH")]
    file: Option<String>,
    /// Size of the frame in columns and lines, as in 100x40 [default: the terminal's, or 100x40]
    #[arg(long, value_name = "COLUMNSxLINES")]
    size: Option<String>,
    /// Use colours: auto, always or never; auto heeds NO_COLOR
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    color: String,
    /// Draw with ASCII alone, as is done where the locale is not UTF-8
    #[arg(long)]
    ascii: bool,
}

const EXAMPLES: &str = "\
Examples:
  modelfs top
  modelfs top /mnt/models
  modelfs top /mnt/models --once --model acme/llama
  modelfs top /mnt/models --json | jq .rates.fetched_bytes

Keys: up and down choose a file (page up, page down, home, end as well), tab and shift-tab a model, m the next mount, \
space stops and goes on, q ends. --json prints one sample: the status, the map, and what changed within --every.";

pub fn run(args: &TopArgs, out: &Out) -> Result<()> {
    let every = parse_duration(&args.every).map_err(|e| e.context("--every"))?;
    if every < INTERVAL_MIN {
        refuse!(Usage, "--every is {} ms, and at least {} ms", every.as_millis(), INTERVAL_MIN.as_millis());
    }
    let terminal = std::io::stdout().is_terminal();
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    let look = Look { color: wants_color(&args.color, terminal && !dumb)?, ascii: args.ascii || !locale_is_utf8() };
    let size = args.size.as_deref().map(parse_size).transpose()?;
    let mounts = sample::mounts(args.mountpoint.as_deref())?;
    let mut top = Top { choice: Choice::default(), mounts, look, every };
    let first = top.sample()?;
    top.choose(args, &first)?;
    if out.json {
        let second = top.after(first.at)?;
        let maps = top.maps(&second, &Room::ample())?;
        let rates = Rates::between(&first, &second);
        return out.result(&sample::to_json(&second, &maps, &rates), String::new);
    }
    if args.once || !terminal {
        let frame = top.frame(&first, size)?;
        return out.result(&serde_json::Value::Null, || frame);
    }
    if dumb { top.scroll(first, size) } else { top.watch(first) }
}

/// `auto` where people see it and did not say no.
fn wants_color(when: &str, shows: bool) -> Result<bool> {
    match when {
        "always" => Ok(true),
        "never" => Ok(false),
        "auto" => Ok(shows && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())),
        other => refuse!(Usage, "--color {other} is none of auto, always and never"),
    }
}

/// The first of these that is set and not empty decides, as setlocale(3) has it.
fn locale_is_utf8() -> bool {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(|name| std::env::var(name).ok());
    let locale = set.into_iter().find(|value| !value.is_empty()).unwrap_or_default().to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

fn parse_size(text: &str) -> Result<(u16, u16)> {
    let side = |side: &str| side.parse().ok().filter(|side| (1..=SIDE_MAX).contains(side));
    let sides = text.split_once('x').and_then(|(columns, lines)| Some((side(columns)?, side(lines)?)));
    sides.ok_or_else(|| Error::new(Code::Usage, format!("--size {text} is not COLUMNSxLINES, as in 100x40")))
}

/// What is watched, and what of it is chosen.
struct Top {
    mounts: Vec<Mount>,
    choice: Choice,
    look: Look,
    every: Duration,
}

impl Top {
    fn mount(&self) -> &Mount {
        &self.mounts[self.choice.mount]
    }

    fn sample(&self) -> Result<Sample> {
        Sample::take(self.mount())
    }

    /// A sample of one interval after another.
    fn after(&self, then: Instant) -> Result<Sample> {
        std::thread::sleep((then + self.every).saturating_duration_since(Instant::now()));
        self.sample()
    }

    /// Finds the model and the file that were named.
    fn choose(&mut self, args: &TopArgs, sample: &Sample) -> Result<()> {
        if let Some(name) = &args.model {
            let found = sample.models().iter().position(|model| model.is_named(name));
            let Some(found) = found else {
                refuse!(NotFound, "{name} is not mounted here; `modelfs status` lists what is");
            };
            self.choice.model = found;
        }
        if let Some(path) = &args.file {
            self.choice.file = sample::find_file(self.mount(), sample, self.choice.model, path)?;
        }
        Ok(())
    }

    fn maps(&mut self, sample: &Sample, room: &Room) -> Result<Maps> {
        Maps::take(&self.mounts[self.choice.mount], sample, &mut self.choice, room)
    }

    fn view<'a>(&'a self, before: &'a Sample, now: &'a Sample, maps: &'a Maps, note: Option<&'a str>) -> View<'a> {
        View { before, now, maps, choice: &self.choice, mounts: self.mounts.len(), look: self.look, note }
    }

    /// One frame as lines, from a sample and another one.
    fn frame(&mut self, before: &Sample, size: Option<(u16, u16)>) -> Result<String> {
        let now = self.after(before.at)?;
        let (columns, lines) = size.or_else(|| ratatui::crossterm::terminal::size().ok()).unwrap_or(SIZE);
        let area = Rect::new(0, 0, columns.clamp(1, SIDE_MAX), lines.clamp(1, SIDE_MAX));
        let maps = self.maps(&now, &Room::of(area, now.models().len()))?;
        let mut buffer = Buffer::empty(area);
        paint::paint(&self.view(before, &now, &maps, None), area, &mut buffer);
        Ok(text::lines(&buffer, self.look.color))
    }

    /// Frame after frame, for terminals that cannot move the cursor.
    fn scroll(&mut self, mut before: Sample, size: Option<(u16, u16)>) -> Result<()> {
        let stop = told_to_stop()?;
        while !stop.load(Ordering::Acquire) {
            let frame = self.frame(&before, size)?;
            std::io::stdout()
                .write_all(format!("{frame}\n").as_bytes())
                .map_err(|e| Error::new(Code::Host, "cannot write to standard output").with_source(e))?;
            before = self.sample()?;
        }
        Ok(())
    }

    /// Until `q`, Ctrl-C, a signal, or the end of the mount.
    fn watch(&mut self, first: Sample) -> Result<()> {
        let stop = told_to_stop()?;
        let fault = |e| Error::new(Code::Host, "cannot use the terminal").with_source(e);
        let _screen = Screen;
        // Installs a hook that gives the terminal back before a panic is told.
        let mut terminal = ratatui::try_init().map_err(fault)?;
        let (mut before, mut now) = (first.clone(), first);
        let mut maps = Maps::default();
        let mut paused = false;
        let mut silent_since: Option<Instant> = None;
        // Of the last question, answered or not: a mount that refuses to answer is not asked more often.
        let mut asked_at = now.at;
        while !stop.load(Ordering::Acquire) {
            let area: Rect = Rect::from((ratatui::layout::Position::ORIGIN, terminal.size().map_err(fault)?));
            let asked = if asked_at.elapsed() >= self.every && !paused {
                asked_at = Instant::now();
                self.sample().map(Some)
            } else {
                Ok(None)
            };
            let answered = asked.and_then(|newer| {
                if let Some(newer) = newer {
                    before = std::mem::replace(&mut now, newer);
                }
                maps = self.maps(&now, &Room::of(area, now.models().len()))?;
                Ok(())
            });
            let note = match answered {
                Ok(()) => {
                    silent_since = None;
                    paused.then(|| "stopped; space goes on".to_owned())
                }
                // It ended: what is on the screen is no longer true of anything.
                Err(error) if error.code() == Code::NotMounted => return Err(error),
                Err(error) => {
                    let since = silent_since.get_or_insert_with(Instant::now);
                    Some(format!("no answer for {} s: {}", since.elapsed().as_secs(), error.chain()))
                }
            };
            let view = self.view(&before, &now, &maps, note.as_deref());
            terminal.draw(|frame| paint::paint(&view, frame.area(), frame.buffer_mut())).map_err(fault)?;
            let page = Room::of(area, now.models().len()).files;
            let due = if paused { Instant::now() } else { asked_at } + self.every;
            match self.await_key(due, &stop).map_err(fault)? {
                Some(Press::Quit) => return Ok(()),
                Some(Press::Pause) => paused = !paused,
                Some(Press::Mount) if self.mounts.len() > 1 => {
                    let next = (self.choice.mount + 1) % self.mounts.len();
                    self.choice = Choice { mount: next, ..Choice::default() };
                    now = self.sample()?;
                    before = now.clone();
                }
                Some(Press::Model(step)) => self.choice.step_model(step, now.models().len()),
                Some(Press::File(step)) => self.choice.step_file(step, page, maps.list.files),
                Some(Press::Mount) | None => {}
            }
        }
        Ok(())
    }

    /// What was pressed, or `None` when it is time for a frame: also when the terminal changed its size.
    fn await_key(&self, due: Instant, stop: &AtomicBool) -> std::io::Result<Option<Press>> {
        while !stop.load(Ordering::Acquire) {
            let left = due.saturating_duration_since(Instant::now());
            if !event::poll(left.min(SIGNAL_POLL))? {
                if left.is_zero() {
                    return Ok(None);
                }
                continue;
            }
            match event::read()? {
                Event::Key(key) => {
                    if let Some(press) = Press::of(&key) {
                        return Ok(Some(press));
                    }
                }
                Event::Resize(..) => return Ok(None),
                Event::FocusGained | Event::FocusLost | Event::Mouse(_) | Event::Paste(_) => {}
            }
        }
        Ok(None)
    }
}

/// What a key means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Press {
    Quit,
    Pause,
    Mount,
    Model(Step),
    File(Step),
}

/// How far a choice moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Next,
    Previous,
    PageDown,
    PageUp,
    First,
    Last,
}

impl Press {
    fn of(key: &KeyEvent) -> Option<Press> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        match key.code {
            KeyCode::Char('c' | 'd') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Press::Quit),
            KeyCode::Char('q') | KeyCode::Esc => Some(Press::Quit),
            KeyCode::Char(' ') => Some(Press::Pause),
            KeyCode::Char('m') => Some(Press::Mount),
            KeyCode::Tab | KeyCode::Right => Some(Press::Model(Step::Next)),
            KeyCode::BackTab | KeyCode::Left => Some(Press::Model(Step::Previous)),
            KeyCode::Down | KeyCode::Char('j') => Some(Press::File(Step::Next)),
            KeyCode::Up | KeyCode::Char('k') => Some(Press::File(Step::Previous)),
            KeyCode::PageDown => Some(Press::File(Step::PageDown)),
            KeyCode::PageUp => Some(Press::File(Step::PageUp)),
            KeyCode::Home => Some(Press::File(Step::First)),
            KeyCode::End => Some(Press::File(Step::Last)),
            _ => None,
        }
    }
}

impl Step {
    /// Where this leads from `at`, in `count` things of which a page shows `page`.
    fn from(self, at: usize, page: usize, count: usize) -> usize {
        let last = count.saturating_sub(1);
        match self {
            Step::Next => at.saturating_add(1).min(last),
            Step::Previous => at.saturating_sub(1).min(last),
            Step::PageDown => at.saturating_add(page.max(1)).min(last),
            Step::PageUp => at.saturating_sub(page.max(1)).min(last),
            Step::First => 0,
            Step::Last => last,
        }
    }
}

/// Gives the terminal back when it goes.
struct Screen;

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to give back.
        let _ = ratatui::try_restore();
    }
}

/// Becomes true when the process is told to end: then the terminal is given back first.
fn told_to_stop() -> Result<Arc<AtomicBool>> {
    let told = Arc::new(AtomicBool::new(false));
    let teller = told.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::new(Code::Host, "cannot listen for signals").with_source(e))?;
    let waiting = runtime.block_on(async { host::told_to_stop() })?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(waiting);
            teller.store(true, Ordering::Release);
        })
        .map_err(|e| Error::new(Code::Host, "cannot start the thread of signals").with_source(e))?;
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_never_leaves_what_there_is() {
        let steps = [Step::Next, Step::Previous, Step::PageDown, Step::PageUp, Step::First, Step::Last];
        for count in [0, 1, 2, 30] {
            for at in [0, 1, 29, 30, usize::MAX] {
                for step in steps {
                    let to = step.from(at, 10, count);
                    assert!(to < count.max(1), "{step:?} from {at} of {count} leads to {to}");
                }
            }
        }
        assert_eq!(Step::PageDown.from(3, 10, 30), 13);
        assert_eq!(Step::PageUp.from(13, 10, 30), 3);
        assert_eq!(Step::Last.from(3, 10, 30), 29);
    }

    #[test]
    fn keys_mean_what_the_help_says() {
        let key = |code| Press::of(&KeyEvent::new(code, KeyModifiers::NONE));
        assert_eq!(key(KeyCode::Char('q')), Some(Press::Quit));
        assert_eq!(key(KeyCode::Char('c')), None);
        assert_eq!(Press::of(&KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Some(Press::Quit));
        assert_eq!(key(KeyCode::Tab), Some(Press::Model(Step::Next)));
        assert_eq!(key(KeyCode::BackTab), Some(Press::Model(Step::Previous)));
        assert_eq!(key(KeyCode::End), Some(Press::File(Step::Last)));
    }

    #[test]
    fn a_size_is_two_numbers_above_nothing() {
        assert_eq!(parse_size("100x40").expect("a size"), (100, 40));
        for bad in ["", "100", "x", "0x40", "100x0", "100x40x2", "-1x4", "1001x10"] {
            assert_eq!(parse_size(bad).expect_err(bad).code(), Code::Usage);
        }
    }
}
