//! What a test does that cannot run here.

/// Says that a test does not run and why; fails where everything is required to be there.
pub fn skip(reason: &str) {
    let set = |name: &str, value: &str| std::env::var(name).is_ok_and(|seen| seen == value);
    let required = set("CI", "true") || set("MODELFS_TEST_REQUIRE_PARTS", "1");
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    assert!(!required, "{test} cannot run: {reason}");
    println!("SKIPPED {test}: {reason}");
}
