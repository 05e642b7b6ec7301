//! Sends images to a registry.

use anyhow::{Context, Result};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::client::{ClientConfig, ClientProtocol, Config, ImageLayer};
use oci_client::manifest::OciImageManifest;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};

use super::archive::Image;

/// Sends one image. TLS, except on this machine, as every client of registries has it.
pub(super) fn push(image: &Image, name: &str) -> Result<()> {
    let reference: Reference = name.parse().with_context(|| format!("'{name}' is no name of an image"))?;
    // Fails only when there is a provider already.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let registry = reference.resolve_registry();
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let protocol =
        if ["localhost", "127.0.0.1", "[::1]"].contains(&host) { ClientProtocol::Http } else { ClientProtocol::Https };
    let client = Client::new(ClientConfig { protocol, ..ClientConfig::default() });
    let manifest: OciImageManifest = serde_json::from_slice(&image.manifest)?;
    let layers = [ImageLayer::new(image.layer.clone(), manifest.layers[0].media_type.clone(), None)];
    let config = Config::new(image.config.clone(), manifest.config.media_type.clone(), None);
    let authentication = authentication(registry)?;
    let pushing = client.push(&reference, &layers, config, &authentication, Some(manifest));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let response = runtime.block_on(pushing).with_context(|| {
        format!("cannot push {name}; if {registry} refused it, log in with `docker login {registry}` or the like")
    })?;
    eprintln!("pushed {name}: {}", response.manifest_url);
    Ok(())
}

/// What `docker login` has stored for the registry.
fn authentication(registry: &str) -> Result<RegistryAuth> {
    match docker_credential::get_credential(registry) {
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(RegistryAuth::Basic(user, password)),
        Ok(DockerCredential::IdentityToken(token)) => Ok(RegistryAuth::Bearer(token)),
        Err(
            CredentialRetrievalError::ConfigNotFound
            | CredentialRetrievalError::ConfigReadError
            | CredentialRetrievalError::NoCredentialConfigured,
        ) => Ok(RegistryAuth::Anonymous),
        Err(error) => Err(error).with_context(|| format!("cannot read what `docker login` stored for {registry}")),
    }
}
