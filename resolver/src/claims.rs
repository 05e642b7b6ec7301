//! What all ElastiServices together want redirected, address by address, so that one that changes costs no look at the others.
//!
//! Pure. Invariant: of several ElastiServices that want one address, that with the first UID has it, in whatever order they came.
//! Used by [`crate::supervisor`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::interception::{Changes, Entries};

/// Where an ElastiService wants the connections to an address, by address and UID: one table, since most addresses are wanted by
/// one, and there are tens of thousands.
#[derive(Debug, Default)]
pub struct Claims(BTreeMap<(SocketAddr, Arc<str>), SocketAddr>);

impl Claims {
    /// From now on this ElastiService wants these and nothing else. What it wanted `before` is what was said last. Adds to
    /// `changes` what is another than before.
    pub fn set(&mut self, uid: &Arc<str>, before: &Entries, wanted: &Entries, changes: &mut Changes) {
        for from in before.keys().filter(|from| !wanted.contains_key(from)) {
            self.0.remove(&(*from, Arc::clone(uid)));
            changes.insert(*from, self.redirected(from));
        }
        for (from, to) in wanted.iter().filter(|(from, to)| before.get(from) != Some(to)) {
            self.0.insert((*from, Arc::clone(uid)), *to);
            changes.insert(*from, self.redirected(from));
        }
    }

    /// Where connections to this address go.
    fn redirected(&self, from: &SocketAddr) -> Option<SocketAddr> {
        self.claims(*from).next().map(|(_, to)| to)
    }

    fn claims(&self, address: SocketAddr) -> impl Iterator<Item = (&Arc<str>, SocketAddr)> {
        let claims = self.0.range((address, Arc::default())..);
        claims.take_while(move |((from, _), _)| *from == address).map(|((_, uid), to)| (uid, *to))
    }

    /// The ElastiServices that want one of these addresses.
    pub fn claimants(&self, changes: &Changes) -> BTreeSet<Arc<str>> {
        changes.keys().flat_map(|from| self.claims(*from)).map(|(uid, _)| Arc::clone(uid)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 96, 0, number], 80))
    }

    fn entries() -> impl Strategy<Value = Entries> {
        prop::collection::hash_map((0_u8..4).prop_map(address), (10_u8..13).prop_map(address), 0..3)
    }

    proptest! {
        #[test]
        fn what_is_redirected_is_as_if_all_were_looked_at(steps in prop::collection::vec((0_u8..3, entries()), 0..30)) {
            let (mut claims, mut redirected) = (Claims::default(), Entries::new());
            let mut all = BTreeMap::new();
            for (uid, wanted) in steps {
                let mut changes = Changes::new();
                let before = all.insert(uid, wanted.clone()).unwrap_or_default();
                claims.set(&uid.to_string().into(), &before, &wanted, &mut changes);
                for (from, to) in changes {
                    match to {
                        Some(to) => redirected.insert(from, to),
                        None => redirected.remove(&from),
                    };
                }
                let expected: Entries = all.values().rev().flatten().map(|(from, to)| (*from, *to)).collect();
                prop_assert_eq!(&redirected, &expected);
            }
        }
    }

    #[test]
    fn what_a_change_costs_does_not_grow_with_the_others() {
        let mut claims = Claims::default();
        let entries = |number| Entries::from([(SocketAddr::from(([10, 96, 0, 1], number)), address(0))]);
        for number in 0..1000 {
            claims.set(&number.to_string().into(), &Entries::new(), &entries(number), &mut Changes::new());
        }
        let mut changes = Changes::new();
        claims.set(&"7".into(), &entries(7), &Entries::new(), &mut changes);
        assert_eq!(changes.into_iter().collect::<Vec<_>>(), [(SocketAddr::from(([10, 96, 0, 1], 7)), None)]);
        claims.set(&"8".into(), &entries(8), &entries(8), &mut Changes::new());
        assert_eq!(claims.0.len(), 999);
    }

    #[test]
    fn all_who_want_an_address_are_told_of_its_change() {
        let (mut claims, entries) = (Claims::default(), Entries::from([(address(1), address(2))]));
        for uid in ["a", "b"] {
            let mut changes = Changes::new();
            claims.set(&uid.into(), &Entries::new(), &entries, &mut changes);
            assert!(claims.claimants(&changes).iter().any(|claimant| &**claimant == uid));
        }
        let mut changes = Changes::new();
        claims.set(&"b".into(), &entries, &Entries::new(), &mut changes);
        assert_eq!(changes, Changes::from([(address(1), Some(address(2)))]), "the other one has it");
        assert_eq!(claims.claimants(&changes), BTreeSet::from(["a".into()]));
    }
}
