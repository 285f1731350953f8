# SPDX-License-Identifier: Apache-2.0
"""The Ansible collection: built by the real ansible-galaxy, run by the real ansible-playbook on played machines."""
