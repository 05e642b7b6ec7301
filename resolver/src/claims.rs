//! What all ElastiServices together want redirected, address by address, so that one that changes costs no look at the others.
//!
//! Pure. Invariant: of several ElastiServices that want one address, that with the last UID has it, in whatever order they came.
//! Used by [`crate::supervisor`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::interception::{Changes, Entries};

/// Who wants which address.
#[derive(Debug, Default)]
pub struct Claims {
    of_address: BTreeMap<SocketAddr, BTreeMap<Arc<str>, SocketAddr>>,
    of_service: BTreeMap<Arc<str>, Entries>,
}

impl Claims {
    /// From now on this ElastiService wants these and nothing else; adds to `changes` what is another than before.
    pub fn set(&mut self, uid: &str, wanted: Entries, changes: &mut Changes) {
        let uid: Arc<str> = uid.into();
        let before = self.of_service.remove(&uid).unwrap_or_default();
        if !wanted.is_empty() {
            self.of_service.insert(Arc::clone(&uid), wanted.clone());
        }
        for from in before.keys().filter(|from| !wanted.contains_key(from)) {
            let claims = self.of_address.entry(*from).or_default();
            claims.remove(&uid);
            if claims.is_empty() {
                self.of_address.remove(from);
            }
            changes.insert(*from, self.redirected(from));
        }
        for (from, to) in wanted.into_iter().filter(|(from, to)| before.get(from) != Some(to)) {
            self.of_address.entry(from).or_default().insert(Arc::clone(&uid), to);
            changes.insert(from, self.redirected(&from));
        }
    }

    /// Where connections to this address go.
    fn redirected(&self, from: &SocketAddr) -> Option<SocketAddr> {
        self.of_address.get(from)?.last_key_value().map(|(_, to)| *to)
    }

    /// The ElastiServices that want one of these addresses.
    pub fn claimants(&self, changes: &Changes) -> BTreeSet<Arc<str>> {
        changes.keys().filter_map(|from| self.of_address.get(from)).flat_map(|claims| claims.keys().cloned()).collect()
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
                claims.set(&uid.to_string(), wanted.clone(), &mut changes);
                all.insert(uid, wanted);
                for (from, to) in changes {
                    match to {
                        Some(to) => redirected.insert(from, to),
                        None => redirected.remove(&from),
                    };
                }
                let expected: Entries = all.values().flatten().map(|(from, to)| (*from, *to)).collect();
                prop_assert_eq!(&redirected, &expected);
            }
        }
    }

    #[test]
    fn what_a_change_costs_does_not_grow_with_the_others() {
        let mut claims = Claims::default();
        for number in 0..1000_u16 {
            let entries = Entries::from([(SocketAddr::from(([10, 96, 0, 1], number)), address(0))]);
            claims.set(&number.to_string(), entries, &mut Changes::new());
        }
        let mut changes = Changes::new();
        claims.set("7", Entries::new(), &mut changes);
        assert_eq!(changes.into_iter().collect::<Vec<_>>(), [(SocketAddr::from(([10, 96, 0, 1], 7)), None)]);
        claims.set("8", Entries::from([(SocketAddr::from(([10, 96, 0, 1], 8)), address(0))]), &mut Changes::new());
        assert_eq!(claims.of_address.len(), 999);
    }

    #[test]
    fn all_who_want_an_address_are_told_of_its_change() {
        let mut claims = Claims::default();
        for uid in ["a", "b"] {
            let mut changes = Changes::new();
            claims.set(uid, Entries::from([(address(1), address(2))]), &mut changes);
            assert!(claims.claimants(&changes).iter().any(|claimant| &**claimant == uid));
        }
        let mut changes = Changes::new();
        claims.set("b", Entries::new(), &mut changes);
        assert_eq!(changes, Changes::from([(address(1), Some(address(2)))]), "the other one has it");
        assert_eq!(claims.claimants(&changes), BTreeSet::from(["a".into()]));
    }
}
