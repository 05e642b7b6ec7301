//! What resolvers say of ElastiServices, kept once for all who say the same.
//!
//! Nearly all of a thousand resolvers say the same of an ElastiService: what it takes is one bit for each, not a record. Used by
//! [`super::Resolvers`] alone, which numbers the resolvers. No I/O.

use std::collections::HashMap;

/// Statements of the kind `T`; what nobody has said is the default one.
#[derive(Debug)]
pub(super) struct Statements<T> {
    of_service: HashMap<String, Vec<Group<T>>>,
    /// How many ElastiServices each resolver speaks of, by its number.
    spoken_of: Vec<usize>,
}

/// Those who say the same of one ElastiService; never empty, and no two of one ElastiService are alike.
#[derive(Debug)]
struct Group<T> {
    said: T,
    by: Numbers,
}

impl<T> Default for Statements<T> {
    fn default() -> Self {
        Self { of_service: HashMap::new(), spoken_of: vec![] }
    }
}

impl<T: Clone + Default + PartialEq> Statements<T> {
    /// Whether this resolver speaks of this ElastiService.
    pub(super) fn contains(&self, uid: &str, resolver: usize) -> bool {
        self.of_service.get(uid).is_some_and(|groups| groups.iter().any(|group| group.by.contains(resolver)))
    }

    /// How many ElastiServices this resolver speaks of.
    pub(super) fn spoken_of(&self, resolver: usize) -> usize {
        self.spoken_of.get(resolver).copied().unwrap_or_default()
    }

    /// Changes what this resolver says of this ElastiService.
    pub(super) fn change<R>(&mut self, uid: &str, resolver: usize, change: impl FnOnce(&mut T) -> R) -> R {
        let groups = match self.of_service.get_mut(uid) {
            Some(groups) => groups,
            // Nearly always there is one group, and `Vec` begins with room for four.
            None => self.of_service.entry(uid.to_owned()).or_insert_with(|| Vec::with_capacity(1)),
        };
        let before = groups.iter().position(|group| group.by.contains(resolver));
        let mut said = before.map(|group| groups[group].said.clone()).unwrap_or_default();
        let result = change(&mut said);
        match before {
            Some(group) if groups[group].said == said => return result,
            Some(group) => leave(groups, group, resolver),
            None => {
                self.spoken_of.resize(self.spoken_of.len().max(resolver + 1), 0);
                self.spoken_of[resolver] += 1;
            }
        }
        match groups.iter_mut().find(|group| group.said == said) {
            Some(group) => group.by.insert(resolver),
            None => groups.push(Group { said, by: Numbers::of(resolver) }),
        }
        result
    }

    /// Who says what of this ElastiService.
    pub(super) fn of(&self, uid: &str) -> impl Iterator<Item = (usize, &T)> {
        let groups = self.of_service.get(uid).into_iter().flatten();
        groups.flat_map(|group| group.by.iter().map(|resolver| (resolver, &group.said)))
    }

    /// What is said of this ElastiService, each once.
    pub(super) fn distinct(&self, uid: &str) -> impl Iterator<Item = &T> {
        self.of_service.get(uid).into_iter().flatten().map(|group| &group.said)
    }

    /// This resolver says nothing of this ElastiService any more.
    pub(super) fn forget(&mut self, uid: &str, resolver: usize) {
        let Some(groups) = self.of_service.get_mut(uid) else { return };
        if let Some(group) = groups.iter().position(|group| group.by.contains(resolver)) {
            leave(groups, group, resolver);
            self.spoken_of[resolver] -= 1;
        }
        if groups.is_empty() {
            self.of_service.remove(uid);
        }
    }

    /// This resolver says nothing any more.
    pub(super) fn forget_all(&mut self, resolver: usize) {
        self.of_service.retain(|_, groups| {
            if let Some(group) = groups.iter().position(|group| group.by.contains(resolver)) {
                leave(groups, group, resolver);
            }
            !groups.is_empty()
        });
        if let Some(count) = self.spoken_of.get_mut(resolver) {
            *count = 0;
        }
    }
}

fn leave<T>(groups: &mut Vec<Group<T>>, group: usize, resolver: usize) {
    groups[group].by.remove(resolver);
    if groups[group].by.is_empty() {
        groups.swap_remove(group);
    }
}

/// A set of small numbers: one bit for each up to the largest.
#[derive(Debug)]
struct Numbers(Vec<u64>);

impl Numbers {
    fn of(number: usize) -> Self {
        let mut numbers = Self(vec![]);
        numbers.insert(number);
        numbers
    }

    fn contains(&self, number: usize) -> bool {
        self.0.get(number / 64).is_some_and(|word| word & 1 << (number % 64) != 0)
    }

    fn insert(&mut self, number: usize) {
        let words = self.0.len().max(number / 64 + 1);
        self.0.resize(words, 0);
        self.0[number / 64] |= 1 << (number % 64);
    }

    fn remove(&mut self, number: usize) {
        if let Some(word) = self.0.get_mut(number / 64) {
            *word &= !(1 << (number % 64));
        }
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        let bits = |word: u64| (0..64).filter(move |bit| word & 1 << bit != 0);
        self.0.iter().enumerate().flat_map(move |(index, word)| bits(*word).map(move |bit| index * 64 + bit))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Say(u8, usize, u8),
        Forget(u8, usize),
        ForgetAll(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let resolver = 0_usize..130;
        let step = prop_oneof![
            6 => (0_u8..3, resolver.clone(), 0_u8..3).prop_map(|(uid, by, said)| Step::Say(uid, by, said)),
            1 => (0_u8..3, resolver.clone()).prop_map(|(uid, by)| Step::Forget(uid, by)),
            1 => resolver.prop_map(Step::ForgetAll),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn who_says_what_is_as_if_each_were_kept_apart(steps in steps()) {
            let (mut statements, mut apart) = (Statements::<u8>::default(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Say(uid, by, said) => {
                        statements.change(&uid.to_string(), by, |statement| *statement = said);
                        apart.insert((uid, by), said);
                    }
                    Step::Forget(uid, by) => {
                        statements.forget(&uid.to_string(), by);
                        apart.remove(&(uid, by));
                    }
                    Step::ForgetAll(by) => {
                        statements.forget_all(by);
                        apart.retain(|(_, resolver), _| *resolver != by);
                    }
                }
            }
            for uid in 0..3 {
                let said: BTreeMap<usize, u8> = statements.of(&uid.to_string()).map(|(by, said)| (by, *said)).collect();
                let expected = apart.iter().filter(|((of, _), _)| *of == uid).map(|((_, by), said)| (*by, *said));
                prop_assert_eq!(&said, &expected.collect());
                prop_assert!(said.keys().all(|by| statements.contains(&uid.to_string(), *by)));
            }
            for by in 0..130 {
                prop_assert_eq!(statements.spoken_of(by), apart.keys().filter(|(_, resolver)| *resolver == by).count());
            }
            let used: std::collections::BTreeSet<u8> = apart.keys().map(|(uid, _)| *uid).collect();
            prop_assert_eq!(statements.of_service.len(), used.len(), "nothing is left of what nobody speaks of");
        }
    }

    #[test]
    fn those_who_say_the_same_are_one_group() {
        let mut statements = Statements::<u8>::default();
        for resolver in 0..1000 {
            statements.change("u", resolver, |said| *said = 7);
        }
        assert_eq!(statements.distinct("u").collect::<Vec<_>>(), [&7]);
        assert_eq!(statements.of("u").count(), 1000);
    }
}
