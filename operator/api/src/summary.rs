//! Summaries of many states, by which operator and resolver find that they have the same without naming each.
//!
//! ElastiServices fall into [`PARTS`] parts by their UIDs. The summary of a part is the sum of the fingerprints of its states'
//! lines, so one that changes costs one subtraction and one addition. Two parts with the same summary are taken for the same:
//! by chance two different ones have it once in 2^64.

/// How many parts there are: with 10,000 ElastiServices ten are in each, so that one that differs costs to tell of ten, and the
/// summary of all is 20 KiB long.
pub const PARTS: usize = 1024;

/// The part of an ElastiService, by its UID; less than [`PARTS`].
pub fn part(uid: &str) -> u16 {
    u16::try_from(fingerprint(uid.as_bytes()) % PARTS as u64).unwrap_or_default()
}

/// A number that stands for a line: FNV-1a of 64 bits. An end of line is no part of it.
pub fn fingerprint(line: &[u8]) -> u64 {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The summary of each part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary(Vec<u64>);

impl Default for Summary {
    /// Of no state.
    fn default() -> Self {
        Self(vec![0; PARTS])
    }
}

impl Summary {
    /// What a peer has told; `None` if it has other parts.
    pub fn told(parts: Vec<u64>) -> Option<Self> {
        (parts.len() == PARTS).then_some(Self(parts))
    }

    /// A state of this part with this fingerprint has come.
    pub fn add(&mut self, part: u16, fingerprint: u64) {
        if let Some(sum) = self.0.get_mut(usize::from(part)) {
            *sum = sum.wrapping_add(fingerprint);
        }
    }

    /// A state of this part with this fingerprint has gone.
    pub fn remove(&mut self, part: u16, fingerprint: u64) {
        self.add(part, fingerprint.wrapping_neg());
    }

    /// The summary of one part; 0 when nothing is in it.
    pub fn of(&self, part: u16) -> u64 {
        self.0.get(usize::from(part)).copied().unwrap_or_default()
    }

    /// The parts in which both have the same.
    pub fn same<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u16> + 'a {
        (0..).zip(self.0.iter().zip(&other.0)).filter(|(_, (ours, theirs))| ours == theirs).map(|(part, _)| part)
    }

    /// All parts, as they are told.
    pub fn parts(&self) -> &[u64] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_does_not_depend_on_the_order_and_what_has_gone_leaves_nothing() {
        let (mut forward, mut backward) = (Summary::default(), Summary::default());
        for number in 0..100_u64 {
            forward.add(7, fingerprint(&number.to_be_bytes()));
            backward.add(7, fingerprint(&(99 - number).to_be_bytes()));
        }
        assert_eq!(forward, backward);
        assert_eq!(forward.same(&Summary::default()).count(), PARTS - 1);
        for number in 0..100_u64 {
            forward.remove(7, fingerprint(&number.to_be_bytes()));
        }
        assert_eq!(forward, Summary::default());
    }

    #[test]
    fn uids_are_spread_over_all_parts() {
        let parts: std::collections::BTreeSet<u16> =
            (0..20_000).map(|number| part(&format!("01234567-89ab-cdef-0123-{number:012}"))).collect();
        assert_eq!(parts.len(), PARTS);
    }

    #[test]
    fn the_end_of_a_line_is_no_part_of_it() {
        assert_eq!(fingerprint(b"a\n"), fingerprint(b"a"));
        assert_ne!(fingerprint(b"a"), fingerprint(b"b"));
    }
}
