//! Prints the `CustomResourceDefinition` of ElastiService; `cargo xtask crd` writes it to `config/crd/`.

use elasti_api::v1alpha1::ElastiService;
use kube::CustomResourceExt;

fn main() -> Result<(), serde_yaml_ng::Error> {
    serde_yaml_ng::to_writer(std::io::stdout().lock(), &ElastiService::crd())
}
