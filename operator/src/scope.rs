//! The namespaces that the operator looks after: all, or those that it was given. Watches and uncached lists go through here,
//! so that an operator for some namespaces asks for nothing outside of them.

use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use kube::api::Api;
use kube::core::{ApiResource, DynamicResourceScope};
use kube::{Client, Resource};

/// The namespaces; empty for all.
#[derive(Clone, Debug, Default)]
pub struct Scope(Arc<[String]>);

impl Scope {
    /// These namespaces; all if there are none.
    pub fn new(namespaces: Vec<String>) -> Self {
        Self(namespaces.into())
    }

    /// What gives access to all objects of a kind in them.
    pub fn apis<K>(&self, client: &Client) -> Vec<Api<K>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        if self.0.is_empty() {
            return vec![Api::all(client.clone())];
        }
        self.0.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect()
    }

    /// The same for a kind that is known at run time only.
    pub fn dynamic_apis<K>(&self, client: &Client, resource: &ApiResource) -> Vec<Api<K>>
    where
        K: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>,
    {
        if self.0.is_empty() {
            return vec![Api::all_with(client.clone(), resource)];
        }
        self.0.iter().map(|namespace| Api::namespaced_with(client.clone(), namespace, resource)).collect()
    }
}
