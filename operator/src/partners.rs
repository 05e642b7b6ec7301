//! ElastiServices that wake together: who is woken with whom, followed from one to the next. Pure.
//!
//! `next` says whom an ElastiService names, or, to go the other way, by whom it is named. Every walk ends: it takes no
//! ElastiService twice.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::observed::ObjectKey;

/// The most ElastiServices that one walk finds: more can only be a mistake, and each look at one costs a walk.
const MAX: usize = 256;

/// All that are reached from `start`, without it.
pub fn reached(start: &ObjectKey, next: impl Fn(&ObjectKey) -> Vec<ObjectKey>) -> BTreeSet<ObjectKey> {
    let (reached, _) = walk(start, next);
    reached.into_keys().filter(|key| key != start).collect()
}

/// The shortest way from `start` back to itself, both ends included; `None` when there is none.
pub fn cycle(start: &ObjectKey, next: impl Fn(&ObjectKey) -> Vec<ObjectKey>) -> Option<Vec<ObjectKey>> {
    let (came_from, last) = walk(start, next);
    let mut at = last?;
    let mut way = vec![start.clone(), at.clone()];
    while at != *start {
        at = came_from.get(&at)?.clone();
        way.push(at.clone());
    }
    way.reverse();
    Some(way)
}

/// From where each was reached first; and from where `start` was reached again.
fn walk(
    start: &ObjectKey,
    next: impl Fn(&ObjectKey) -> Vec<ObjectKey>,
) -> (BTreeMap<ObjectKey, ObjectKey>, Option<ObjectKey>) {
    let (mut came_from, mut last) = (BTreeMap::new(), None);
    let mut due = VecDeque::from([start.clone()]);
    while let Some(key) = due.pop_front() {
        for found in next(&key) {
            if found == *start {
                last.get_or_insert_with(|| key.clone());
            } else if came_from.len() < MAX && !came_from.contains_key(&found) {
                came_from.insert(found.clone(), key.clone());
                due.push_back(found);
            }
        }
    }
    (came_from, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("n", name)
    }

    fn next(edges: &[(&str, &str)]) -> impl Fn(&ObjectKey) -> Vec<ObjectKey> {
        move |from| edges.iter().filter(|(edge, _)| key(edge) == *from).map(|(_, to)| key(to)).collect()
    }

    fn names(keys: impl IntoIterator<Item = ObjectKey>) -> Vec<String> {
        keys.into_iter().map(|key| key.name).collect()
    }

    #[test]
    fn partners_of_partners_are_reached_once_whatever_the_circles() {
        let edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "b"), ("x", "a")];
        assert_eq!(names(reached(&key("a"), next(&edges))), ["b", "c", "d"]);
        assert_eq!(names(reached(&key("d"), next(&edges))), ["b"]);
        assert!(reached(&key("lonely"), next(&edges)).is_empty());
    }

    #[test]
    fn the_shortest_way_back_is_found() {
        let edges = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("c", "a"), ("x", "a"), ("s", "s")];
        assert_eq!(names(cycle(&key("a"), next(&edges)).unwrap()), ["a", "b", "c", "a"]);
        assert_eq!(names(cycle(&key("s"), next(&edges)).unwrap()), ["s", "s"]);
        assert_eq!(cycle(&key("x"), next(&edges)), None, "it leads into a circle and is not part of it");
    }

    #[test]
    fn a_walk_is_bounded() {
        let next = |from: &ObjectKey| vec![key(&format!("{}x", from.name)), key(&format!("{}y", from.name))];
        assert_eq!(reached(&key("a"), next).len(), MAX);
    }
}
