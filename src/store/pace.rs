//! How fast a store answers, and what follows from it: when a request is hopelessly behind its peers, and in how many
//! requests one range is fetched. Pure: time comes in as durations.
//!
//! In: what finished requests took. Out: verdicts on running ones, a number of parts.
//! Promises: nothing is judged below [`FLOOR`]; extra requests stay within [`EXTRA_SHARE`] of all requests and
//! [`EXTRA_BURST`] beyond; a range that no measurement asks to split stays whole.
//! Not here: sending anything (`hedge`), giving up (`patient`, `wire`).
//! Held by: the tests below, tests/slow_store.rs.

use std::time::Duration;

/// A request younger or silent for less than this is left alone: a busy machine makes its own pauses of this order.
pub const FLOOR: Duration = Duration::from_millis(300);

/// The same while nothing is known of the store, and the most that knowledge can stretch a wait without any byte.
pub const UNKNOWN: Duration = Duration::from_secs(2);

/// How many times its peers' 90 % quantile a first byte may take.
const FIRST_BYTE_TIMES: u32 = 4;

/// How many times its peers' median the whole of a request may take.
const WHOLE_TIMES: u32 = 3;

/// And how many times that a late one may still need at its own pace.
const LEFT_TIMES: u32 = 4;

/// Extra requests, as a share of all: with one connection in ten stuck, one request in nine needs another, and chance
/// needs room.
pub const EXTRA_SHARE: f64 = 0.2;

/// Extra requests at once, before any share was earned: half of the requests a mount has in flight.
pub const EXTRA_BURST: f64 = 8.0;

/// Extra requests for one range in its life, one at a time. Of a store that loses one connection in ten, two lost in a row
/// are met once in a hundred chunks, four once in ten thousand.
pub const EXTRA_PER_RANGE_MAX: u32 = 3;

/// Finished requests remembered: some seconds of a stream.
const SAMPLES_MAX: usize = 64;

/// Fewer than this say nothing about their peers.
const SAMPLES_MIN: usize = 4;

/// Bodies shorter than this say nothing about a rate.
const RATE_BYTES_MIN: u64 = 64 << 10;

/// Requests for one range at once: 8 MiB by the megabyte.
const PARTS_MAX: u64 = 8;

/// No part is smaller: below, what a request costs shows.
const PART_BYTES_MIN: u64 = 1 << 20;

/// A part worth a request of its own takes half the time to its first byte, and never less than this: a near store, whose
/// ranges come in a few milliseconds, is asked for them whole.
const PART_TIME_MIN: Duration = Duration::from_millis(10);

/// Connections to one store at once, to begin with: what a mount has chunks in flight.
const CONNECTIONS_FIRST: usize = 16;

/// And at most. Bytes in flight stay those of the ranges asked for, however many parts they come in.
pub const CONNECTIONS_MAX: usize = 64;

/// Ranges between two looks at the rate.
const EPOCH_RANGES: u32 = 16;

/// Fewer ranges in flight than this keep no link busy: their rate says nothing about it.
const BUSY_RANGES: usize = 8;

/// What more connections must bring to be kept.
const GAIN_MIN: f64 = 1.1;

/// Epochs without another try after one that brought nothing: doubled each time, up to this.
const REST_MAX: u32 = 64;

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Since it was sent.
    pub elapsed: Duration,
    /// Bytes of the body.
    pub received: u64,
    /// Since its last byte, or since it was sent.
    pub silent: Duration,
}

/// What to do about a running request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is far behind its peers: another one would be faster.
    Behind,
    /// Nothing to say before that much more time.
    LookAgain(Duration),
}

/// A ring of the latest values, read by quantile.
#[derive(Debug, Default)]
struct Ring {
    values: Vec<f64>,
    next: usize,
}

impl Ring {
    fn add(&mut self, value: f64) {
        if self.values.len() < SAMPLES_MAX {
            self.values.push(value);
        } else {
            self.values[self.next] = value;
        }
        self.next = (self.next + 1) % SAMPLES_MAX;
    }

    fn quantile(&self, share: f64) -> Option<f64> {
        if self.values.len() < SAMPLES_MIN {
            return None;
        }
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        Some(sorted[((sorted.len() - 1) as f64 * share).round() as usize])
    }
}

/// How many connections a stream gets: more as long as more bring more.
#[derive(Debug)]
struct Window {
    connections: usize,
    /// The number before, while more are tried.
    before: Option<usize>,
    /// Bytes a second of the last epoch that counts.
    rate: f64,
    /// Epochs to go before the next try, and how many after a try in vain.
    rest: u32,
    rest_next: u32,
    /// Ranges that began under another number and are not counted.
    skip: usize,
    since: Duration,
    bytes: u64,
    ranges: u32,
}

impl Default for Window {
    fn default() -> Self {
        let (before, rate, since) = (None, 0.0, Duration::ZERO);
        Window {
            connections: CONNECTIONS_FIRST,
            before,
            rate,
            rest: 1,
            rest_next: 2,
            skip: 0,
            since,
            bytes: 0,
            ranges: 0,
        }
    }
}

impl Window {
    /// A range of `bytes` ended at `now`, `in_flight` ranges with it; `wanted`: parts it would be worth having.
    fn ended(&mut self, bytes: u64, in_flight: usize, wanted: u64, now: Duration) {
        if in_flight < BUSY_RANGES || self.skip > 0 {
            self.skip = self.skip.saturating_sub(1);
            (self.since, self.bytes, self.ranges) = (now, 0, 0);
            return;
        }
        self.bytes += bytes;
        self.ranges += 1;
        if self.ranges < EPOCH_RANGES {
            return;
        }
        let rate = self.bytes as f64 / now.saturating_sub(self.since).as_secs_f64().max(1e-6);
        match self.before.take() {
            Some(before) if rate < GAIN_MIN * self.rate => {
                self.connections = before;
                self.rest = self.rest_next;
                self.rest_next = (self.rest_next * 2).min(REST_MAX);
                self.skip = in_flight;
            }
            Some(_) => {
                self.rate = rate;
                self.rest = 0;
            }
            None => {
                self.rate = rate;
                self.rest = self.rest.saturating_sub(1);
                let more = self.connections < CONNECTIONS_MAX && wanted > (self.connections / in_flight) as u64;
                if self.rest == 0 && more {
                    self.before = Some(self.connections);
                    self.connections = (self.connections * 2).min(CONNECTIONS_MAX);
                    self.skip = in_flight;
                }
            }
        }
        (self.since, self.bytes, self.ranges) = (now, 0, 0);
    }
}

/// What the latest requests to one store took.
#[derive(Debug)]
pub struct Pace {
    /// Seconds to the first byte of a body.
    first_byte: Ring,
    /// Bytes a second from the first byte on.
    rate: Ring,
    extra_left: f64,
    window: Window,
}

impl Default for Pace {
    fn default() -> Self {
        let (first_byte, rate, window) = Default::default();
        Pace { first_byte, rate, extra_left: EXTRA_BURST, window }
    }
}

impl Pace {
    /// A request was sent that is no extra one.
    pub fn asked(&mut self) {
        self.extra_left = (self.extra_left + EXTRA_SHARE).min(EXTRA_BURST);
    }

    /// Whether one more extra request is within the budget; if so it counts as sent.
    pub fn take_extra(&mut self) -> bool {
        let may = self.extra_left >= 1.0;
        if may {
            self.extra_left -= 1.0;
        }
        may
    }

    /// A request brought `bytes`, the first after `first_byte`, the last after `whole`.
    pub fn brought(&mut self, bytes: u64, first_byte: Duration, whole: Duration) {
        self.first_byte.add(first_byte.as_secs_f64());
        if bytes >= RATE_BYTES_MIN {
            // A body that came in one piece took no time: a millisecond is as little as can be told.
            let body = whole.saturating_sub(first_byte).max(Duration::from_millis(1));
            self.rate.add(bytes as f64 / body.as_secs_f64());
        }
    }

    /// In how many requests at once to fetch a range of `len` bytes, as one of `ranges` in flight.
    ///
    /// A lone range is waited for by a reader, and most of its time on a far store is one connection's slowness: it comes
    /// in parts. Of a stream each range comes whole, until more connections were seen to bring more.
    pub fn parts(&self, len: u64, ranges: usize) -> u64 {
        self.parts_worth(len).min((self.window.connections / ranges.max(1)) as u64).max(1)
    }

    /// Parts that take long enough to be worth a request each.
    fn parts_worth(&self, len: u64) -> u64 {
        let (Some(first), Some(rate)) = (self.first_byte.quantile(0.1), self.rate.quantile(0.5)) else { return 1 };
        let part = rate * (first / 2.0).max(PART_TIME_MIN.as_secs_f64());
        (len / (part as u64).max(PART_BYTES_MIN)).clamp(1, PARTS_MAX)
    }

    /// A range of `bytes`, however many parts it had, ended at `now`; `ranges` were in flight with it.
    pub fn range_ended(&mut self, bytes: u64, ranges: usize, now: Duration) {
        let wanted = self.parts_worth(bytes);
        self.window.ended(bytes, ranges, wanted, now);
    }

    /// Whether a request for `len` bytes (`None`: nobody knows how many) is far behind what its peers took. `extra`: how
    /// many extra requests its range had already; each doubles the patience with the next. `ranges`: in flight now.
    pub fn verdict(&self, seen: Seen, len: Option<u64>, extra: u32, ranges: usize) -> Verdict {
        let patience = |limit: Duration| limit.max(FLOOR).saturating_mul(1 << extra.min(8));
        // Of a link that few are left to share each should have more: the end of a fill must not wait as long as its
        // middle. Never less than twice what a first byte took when it was quick.
        let share = ranges.clamp(1, BUSY_RANGES) as f64 / BUSY_RANGES as f64;
        let quick = self.first_byte.quantile(0.1).map_or(UNKNOWN, |first| Duration::from_secs_f64(2.0 * first));
        let shared = |limit: Duration| limit.mul_f64(share).max(quick.min(limit));
        let whole = len.and_then(|len| {
            let (first, rate) = (self.first_byte.quantile(0.5)?, self.rate.quantile(0.5)?);
            Some((len, Duration::from_secs_f64(first + len as f64 / rate)))
        });
        let usual = whole.map_or(Duration::ZERO, |(_, whole)| whole);
        // Small objects are no peers of ranges: a dozen ranges begun at once fill a link before the first byte of some.
        let peers = self.first_byte.quantile(0.9).filter(|_| len.is_none() || whole.is_some());
        let first_byte_limit = peers.map_or(UNKNOWN, |s| {
            let s = Duration::from_secs_f64(s);
            // What is known shortens the wait; a store whose every answer takes seconds is not asked twice for all.
            s.saturating_mul(FIRST_BYTE_TIMES).max(usual).min(UNKNOWN.max(s.saturating_mul(2)))
        });
        if seen.received == 0 {
            return over(seen.elapsed, patience(shared(first_byte_limit)));
        }
        let Some((len, whole)) = whole else { return over(seen.silent, patience(UNKNOWN)) };
        // On a full link packets are lost, and the pauses after that are some of the time of a whole range.
        let silence = first_byte_limit.max(whole.saturating_mul(2)).min(UNKNOWN);
        let Verdict::LookAgain(silence) = over(seen.silent, patience(shared(silence))) else { return Verdict::Behind };
        let pace = match over(seen.elapsed, patience(whole.saturating_mul(WHOLE_TIMES))) {
            Verdict::LookAgain(wait) => wait,
            Verdict::Behind => {
                let left = len.saturating_sub(seen.received) as f64;
                let left = Duration::from_secs_f64(seen.elapsed.as_secs_f64() * left / seen.received as f64);
                // Late, but on its way: connections that share a full link share it unevenly, and another request for
                // the same bytes would only take from the rest.
                if left > whole.saturating_mul(LEFT_TIMES).max(FLOOR) {
                    return Verdict::Behind;
                }
                left.max(FLOOR / 4)
            }
        };
        Verdict::LookAgain(silence.min(pace))
    }
}

fn over(time: Duration, limit: Duration) -> Verdict {
    match limit.checked_sub(time) {
        Some(left) if !left.is_zero() => Verdict::LookAgain(left),
        Some(_) | None => Verdict::Behind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A store with 100 ms to the first byte and 50 MB/s a connection.
    fn far() -> Pace {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.brought(8 * MIB, ms(100), ms(268));
        }
        pace
    }

    fn seen(elapsed: u64, received: u64, silent: u64) -> Seen {
        Seen { elapsed: ms(elapsed), received, silent: ms(silent) }
    }

    #[test]
    fn a_request_without_a_byte_is_behind_after_four_times_its_peers() {
        let pace = far();
        assert_eq!(pace.verdict(seen(0, 0, 0), Some(8 * MIB), 0, 16), Verdict::LookAgain(ms(400)));
        assert_eq!(pace.verdict(seen(399, 0, 399), Some(8 * MIB), 0, 16), Verdict::LookAgain(ms(1)));
        assert_eq!(pace.verdict(seen(400, 0, 400), Some(8 * MIB), 0, 16), Verdict::Behind);
    }

    /// What crowds made slow is no measure once the crowd has gone; what the store itself takes is.
    #[test]
    fn a_request_among_few_is_behind_sooner_but_never_before_twice_a_quick_answer() {
        let mut pace = Pace::default();
        for nth in 0..64 {
            pace.brought(8 * MIB, ms(if nth % 8 == 0 { 100 } else { 500 }), ms(1200));
        }
        let behind = |ranges| {
            (0..5000).find(|&at| pace.verdict(seen(at, 0, at), Some(8 * MIB), 0, ranges) == Verdict::Behind).unwrap()
        };
        assert_eq!(behind(16), behind(8));
        assert!(behind(4) < behind(8) && behind(1) < behind(4), "{} {} {}", behind(1), behind(4), behind(8));
        assert!(behind(1) >= 300);

        let mut slow = Pace::default();
        for _ in 0..20 {
            slow.brought(MIB, ms(1000), ms(1100));
        }
        assert_eq!(slow.verdict(seen(1900, 0, 1900), Some(MIB), 0, 1), Verdict::LookAgain(ms(100)));
    }

    #[test]
    fn nothing_is_behind_below_the_floor() {
        let mut pace = Pace::default();
        for _ in 0..64 {
            pace.brought(MIB, ms(0), ms(1));
        }
        for received in [0, 1, MIB - 1] {
            let verdict = pace.verdict(seen(299, received, 299), Some(MIB), 0, 16);
            assert!(matches!(verdict, Verdict::LookAgain(_)), "{received}: {verdict:?}");
        }
        assert_eq!(pace.verdict(seen(300, 0, 300), Some(MIB), 0, 16), Verdict::Behind);
    }

    #[test]
    fn an_unknown_store_has_two_seconds() {
        let mut pace = Pace::default();
        for _ in 0..SAMPLES_MIN - 1 {
            pace.brought(MIB, ms(5), ms(6));
        }
        assert_eq!(pace.verdict(seen(1500, 0, 1500), Some(MIB), 0, 16), Verdict::LookAgain(ms(500)));
        assert_eq!(pace.verdict(seen(9000, MIB / 2, 100), Some(MIB), 0, 16), Verdict::LookAgain(ms(1900)));
        assert_eq!(pace.verdict(seen(2000, 0, 2000), Some(MIB), 0, 16), Verdict::Behind);
    }

    #[test]
    fn small_objects_are_no_peers_of_the_first_ranges() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.brought(500, ms(1), ms(1));
        }
        assert_eq!(pace.verdict(seen(1500, 0, 1500), Some(8 * MIB), 0, 16), Verdict::LookAgain(ms(500)));
        assert_eq!(pace.verdict(seen(300, 0, 300), None, 0, 16), Verdict::Behind);
    }

    #[test]
    fn a_store_whose_every_answer_takes_seconds_is_not_asked_twice_for_all() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.brought(MIB, ms(5000), ms(5100));
        }
        assert_eq!(pace.verdict(seen(9000, 0, 9000), Some(MIB), 0, 16), Verdict::LookAgain(ms(1000)));
    }

    #[test]
    fn a_body_that_stops_half_way_is_behind() {
        let pace = far();
        assert!(matches!(pace.verdict(seen(350, 7 * MIB, 100), Some(8 * MIB), 0, 16), Verdict::LookAgain(_)));
        assert_eq!(pace.verdict(seen(700, 7 * MIB, 540), Some(8 * MIB), 0, 16), Verdict::Behind);
    }

    #[test]
    fn a_body_of_ten_kilobytes_a_second_is_behind_and_one_nearly_there_is_not() {
        let pace = far();
        assert_eq!(pace.verdict(seen(900, 8_000, 50), Some(8 * MIB), 0, 16), Verdict::Behind);
        assert!(matches!(pace.verdict(seen(900, 7 * MIB, 50), Some(8 * MIB), 0, 16), Verdict::LookAgain(_)));
    }

    #[test]
    fn a_link_that_is_slow_for_all_is_behind_for_none() {
        let mut pace = Pace::default();
        // Sixteen share 1 Gb/s.
        for _ in 0..20 {
            pace.brought(8 * MIB, ms(30), ms(1070));
        }
        for elapsed in (50..3000).step_by(50) {
            let received = 8 * MIB * elapsed / 3100;
            assert!(matches!(pace.verdict(seen(elapsed, received, 50), Some(8 * MIB), 0, 16), Verdict::LookAgain(_)));
        }
        // And the links' shares are uneven: a third of the pace, a first byte after most of a second.
        assert!(matches!(pace.verdict(seen(3300, 4 * MIB, 500), Some(8 * MIB), 0, 16), Verdict::LookAgain(_)));
        assert!(matches!(pace.verdict(seen(1000, 0, 1000), Some(8 * MIB), 0, 16), Verdict::LookAgain(_)));
    }

    #[test]
    fn each_extra_request_doubles_the_patience_with_the_next() {
        let pace = far();
        for (extra, limit) in [(0, 400), (1, 800), (2, 1600)] {
            assert_eq!(pace.verdict(seen(0, 0, 0), Some(8 * MIB), extra, 16), Verdict::LookAgain(ms(limit)));
        }
    }

    #[test]
    fn extra_requests_stay_within_their_share() {
        let mut pace = Pace::default();
        let mut extra = 0;
        for _ in 0..1000 {
            pace.asked();
            extra += u32::from(pace.take_extra());
        }
        let most = EXTRA_BURST + EXTRA_SHARE * 1000.0;
        assert!(f64::from(extra) <= most && f64::from(extra) > 0.9 * EXTRA_SHARE * 1000.0, "{extra} of {most}");
    }

    #[test]
    fn a_pause_earns_no_more_than_one_burst() {
        let mut pace = Pace::default();
        (0..1000).for_each(|_| pace.asked());
        let burst = (0..100).filter(|_| pace.take_extra()).count();
        assert_eq!(burst as f64, EXTRA_BURST);
    }

    #[test]
    fn a_lone_range_of_a_far_store_comes_in_parts_and_of_a_near_one_whole() {
        assert_eq!(far().parts(8 * MIB, 1), 3);
        assert_eq!(far().parts(MIB, 1), 1, "a small one is not worth it");
        let mut near = Pace::default();
        for _ in 0..20 {
            near.brought(8 * MIB, ms(1), ms(9));
        }
        assert_eq!(near.parts(8 * MIB, 1), 1);
        assert_eq!(Pace::default().parts(8 * MIB, 1), 1, "nothing is known");
    }

    /// A stream of 16 ranges over connections of 50 MB/s with 100 ms to the first byte, on a link of `link` bytes a second:
    /// the parts of a range after `ranges` of them.
    fn streamed(link: f64, ranges: u32) -> u64 {
        let mut pace = far();
        let mut now = 0.0;
        for _ in 0..ranges {
            let parts = pace.parts(8 * MIB, 16);
            let alone = 0.1 + (8 * MIB / parts) as f64 / 50e6;
            let rate = (16.0 * (8 * MIB) as f64 / alone).min(link);
            now += (8 * MIB) as f64 / rate;
            pace.range_ended(8 * MIB, 16, Duration::from_secs_f64(now));
        }
        pace.parts(8 * MIB, 16)
    }

    #[test]
    fn a_stream_gets_more_connections_while_they_bring_more() {
        assert_eq!(streamed(10e9, 15), 1);
        assert_eq!(streamed(10e9, 500), 3, "as many as are worth it");
    }

    #[test]
    fn a_stream_that_fills_its_link_gets_no_more_connections() {
        let split = (100..1000).filter(|&ranges| streamed(125e6, ranges) > 1).count();
        assert!(split < 200, "tried for {split} of 900 ranges");
    }

    #[test]
    fn a_few_ranges_in_flight_say_nothing_about_the_link() {
        let mut pace = far();
        for second in 0..1000 {
            pace.range_ended(8 * MIB, BUSY_RANGES - 1, Duration::from_secs(second));
        }
        assert_eq!(pace.window.connections, CONNECTIONS_FIRST);
    }
}
